// Package cgroup puts each sandbox into a control group of its own, on hosts with cgroup v1, v2, or v1 with a v2 mount
// beside it (hybrid). Limits and counters go through containerd/cgroups; entering at clone, killing and deleting are ours.
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"

	cgroups "github.com/containerd/cgroups/v3"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	root = "/sys/fs/cgroup"
	// deleteTimeout bounds how long Delete waits for killed processes to go: a process in an uninterruptible read of a
	// dead disk never does.
	deleteTimeout = 10 * time.Second
	// deletePollMin and deletePollMax pace that wait: most processes are gone in a few milliseconds.
	deletePollMin = 500 * time.Microsecond
	deletePollMax = 20 * time.Millisecond
)

// Modes of a host, as Mode answers.
const (
	ModeV1     = "v1"
	ModeHybrid = "hybrid"
	ModeV2     = "v2"
)

// Mode is the host's: v1, v2, or hybrid when the controllers are v1's but a cgroup2 mount exists beside them, which then
// gives cgroup.kill. Empty when no cgroup file system is mounted.
func Mode() string {
	switch cgroups.Mode() {
	case cgroups.Legacy:
		return ModeV1
	case cgroups.Hybrid:
		return ModeHybrid
	case cgroups.Unified:
		return ModeV2
	default:
		return ""
	}
}

// Limits of a group; zero means none.
type Limits struct {
	// Thousandths of a processor.
	CPUMillis   uint32
	MemoryBytes uint64
	// Processes and threads.
	Pids uint32
	// Of these, how many may be behind the inner door (InnerDoor); none means that there is no such door.
	InnerPids uint32
	// See spec.Resources. What the host cannot enforce, Check refuses.
	CPUWeight       uint32
	CPUSet          string
	MemoryHighBytes uint64
	SwapBytes       uint64
	OOMGroup        bool
	IO              IO
	// The only device nodes the group's processes may open, wherever they find them; nobody may make any. Nil means all.
	Devices []Device
}

// Device is a character device.
type Device struct {
	Major int64
	// AnyMinor for all of the major's.
	Minor int64
	// Why processes need it.
	Reason string
}

// AnyMinor stands for every minor number.
const AnyMinor = -1

// deviceRules says the same to containerd/cgroups: the first rule denies everything.
func deviceRules(devices []Device) []specs.LinuxDeviceCgroup {
	if devices == nil {
		return nil
	}
	every := int64(AnyMinor)
	rules := []specs.LinuxDeviceCgroup{{Allow: false, Type: "a", Major: &every, Minor: &every, Access: "rwm"}}
	for _, d := range devices {
		rules = append(rules, specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: &d.Major, Minor: &d.Minor, Access: "rw"})
	}
	return rules
}

// hierarchies is one version's way to limit and count.
type hierarchies interface {
	// check refuses limits that this host cannot enforce.
	check(l Limits) error
	// create makes the group in every hierarchy and sets its limits.
	create(path string, l Limits) error
	// prepare and complete are create in two parts: after the first a process can be cloned into the group, and after the second
	// it can enter the rest by writing "0" to the doors.
	prepare(path string, l Limits) error
	complete(path string, l Limits) error
	doors(path string, l Limits) []string
	// innerDoor is the file of InnerDoor, made by create where there is a limit for what is behind it.
	innerDoor(path string) string
	// update brings a group's limits to l, but for Devices. What l does not limit is unlimited afterwards.
	update(path string, l Limits) error
	// freeze and thaw only ask; frozen says what has come of it.
	freeze(path string, on bool) error
	frozen(path string) (bool, error)
	// dirs are the group's directories, whether or not they exist.
	dirs(path string) []string
	// start calls fn, on a thread that serves nothing else afterwards, where a process that it forks with attr is in the group.
	start(path string, attr *syscall.SysProcAttr, fn func(*syscall.SysProcAttr) error) error
	kill(path string) error
	usage(path string) (spec.Usage, error)
}

// Group is one sandbox's control group.
type Group struct {
	path string // from each hierarchy's root: /parent/id
	h    hierarchies
	// The group's directory in the cgroup2 hierarchy, empty on v1.
	unified string
}

// namePattern keeps names from meaning something to the cgroup file system.
var namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9_:@-]*(\.(slice|scope|service))?$`)

func groupPath(parent, id string) (string, error) {
	parts := append(strings.Split(strings.Trim(parent, "/"), "/"), id)
	for _, p := range parts {
		if !namePattern.MatchString(p) {
			return "", fmt.Errorf("cannot use %q as the name of a cgroup", p)
		}
	}
	return "/" + strings.Join(parts, "/"), nil
}

// CheckParent reports whether parent can be given to the other functions.
func CheckParent(parent string) error {
	_, err := groupPath(parent, "x")
	return err
}

func open(parent, id string) (*Group, error) {
	path, err := groupPath(parent, id)
	if err != nil {
		return nil, err
	}
	g := &Group{path: path}
	switch Mode() {
	case ModeV2:
		g.h, g.unified = v2{}, filepath.Join(root, path)
	case ModeHybrid:
		g.unified = filepath.Join(unifiedMount, path)
		g.h = v1{unified: true}
	case ModeV1:
		g.h = v1{}
	default:
		return nil, spec.Errorf(spec.KindUnsupported, "cannot use cgroups: nothing is mounted on %s", root)
	}
	return g, nil
}

// New makes the group id below parent and limits it. A group left by a daemon that died is used, if it is empty.
func New(parent, id string, l Limits) (*Group, error) {
	g, err := open(parent, id)
	if err != nil {
		return nil, err
	}
	if err := check(g.h, l); err != nil {
		return nil, err
	}
	return g.made(func() error { return g.h.create(g.path, l) })
}

// Prepare makes of a new group what a process needs to be cloned into it (see Unified); Complete makes the rest, which the
// process enters through Doors. That is New in two parts, for who has something to do between them.
func Prepare(parent, id string, l Limits) (*Group, error) {
	g, err := open(parent, id)
	if err != nil {
		return nil, err
	}
	if err := check(g.h, l); err != nil {
		return nil, err
	}
	return g.made(func() error { return g.h.prepare(g.path, l) })
}

// made makes the group, and checks that it is empty.
func (g *Group) made(create func() error) (*Group, error) {
	left := slices.ContainsFunc(g.h.dirs(g.path), exists)
	if err := create(); err != nil {
		_ = g.remove() // the first error counts
		return nil, fmt.Errorf("cannot make the cgroup %s: %w", g.path, err)
	}
	fault.At("cgroup", "made")
	if !left { // nobody can be in what was just made
		return g, nil
	}
	pids, err := g.Pids()
	if err != nil {
		return nil, err
	}
	if len(pids) > 0 {
		return nil, fmt.Errorf("cannot make the cgroup %s: it holds process %d already", g.path, pids[0])
	}
	return g, nil
}

// Complete makes the rest of what Prepare began, with the same limits.
func (g *Group) Complete(l Limits) error {
	if err := g.h.complete(g.path, l); err != nil {
		return fmt.Errorf("cannot make the cgroup %s: %w", g.path, err)
	}
	return nil
}

// Load finds a group that an earlier daemon made; an error of KindNotFound if there is none.
func Load(parent, id string) (*Group, error) {
	g, err := open(parent, id)
	if err != nil {
		return nil, err
	}
	for _, dir := range g.h.dirs(g.path) {
		if _, err := os.Lstat(dir); err == nil {
			return g, nil
		}
	}
	return nil, spec.Errorf(spec.KindNotFound, "there is no cgroup %s", g.path)
}

// List names the groups below parent that have a directory in any hierarchy.
func List(parent string) ([]string, error) {
	g, err := open(parent, "x")
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, dir := range g.h.dirs(filepath.Dir(g.path)) {
		entries, err := os.ReadDir(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot list the cgroups of %s: %w", parent, err)
		}
		for _, e := range entries {
			if e.IsDir() {
				ids = append(ids, e.Name())
			}
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// RemoveParent deletes parent itself, if nothing is left below it.
func RemoveParent(parent string) error {
	g, err := open(parent, "x")
	if err != nil {
		return err
	}
	for _, dir := range g.h.dirs(filepath.Dir(g.path)) {
		if err := unix.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("cannot remove the cgroup %s: %w", parent, err)
		}
	}
	return nil
}

// Unified opens the group's directory in the cgroup2 hierarchy, for CLONE_INTO_CGROUP; nil where there is no such hierarchy.
func (g *Group) Unified() (*os.File, error) {
	if g.unified == "" {
		return nil, nil
	}
	dir, err := os.OpenFile(g.unified, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the cgroup %s: %w", g.path, err)
	}
	return dir, nil
}

// DoorCount is how many files Doors answers with.
func (g *Group) DoorCount(l Limits) int { return len(g.h.doors(g.path, l)) }

// Doors opens the files through which a process enters a group of such limits, beyond being cloned into it: it writes "0" to
// each. The kernel lets it, whoever it is, because the caller could. They are the caller's to close.
func (g *Group) Doors(l Limits) ([]*os.File, error) {
	var doors []*os.File
	for _, path := range g.h.doors(g.path, l) {
		f, err := os.OpenFile(path, os.O_WRONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			for _, d := range doors {
				_ = d.Close() // nothing was written
			}
			return nil, fmt.Errorf("cannot open the cgroup %s: %w", g.path, err)
		}
		doors = append(doors, f)
	}
	return doors, nil
}

// Start runs fn so that a process it forks with attr is in the group from its clone on. fn runs on an OS thread that
// serves nothing else afterwards; it must fork on the goroutine it is called on.
func (g *Group) Start(fn func(attr *syscall.SysProcAttr) error) error {
	attr := &syscall.SysProcAttr{}
	dir, err := g.Unified()
	if err != nil {
		return err
	}
	if dir != nil {
		defer dir.Close() //nolint:errcheck // a path descriptor
		attr.UseCgroupFD, attr.CgroupFD = true, int(dir.Fd())
	}
	return g.h.start(g.path, attr, fn)
}

// Pids are the processes of the group, as the host numbers them.
func (g *Group) Pids() ([]int, error) {
	var pids []int
	for _, dir := range g.h.dirs(g.path) {
		p, err := processes(dir)
		if err != nil {
			return nil, fmt.Errorf("cannot list the processes of the cgroup %s: %w", g.path, err)
		}
		pids = append(pids, p...)
	}
	slices.Sort(pids)
	return slices.Compact(pids), nil
}

// Kill sends SIGKILL to every process of the group, those forked meanwhile included. It does not wait. Idempotent.
func (g *Group) Kill() error {
	if err := g.h.kill(g.path); err != nil && !gone(err) {
		return fmt.Errorf("cannot kill the cgroup %s: %w", g.path, err)
	}
	return nil
}

// Usage is what the group has used so far. Disk fields stay zero.
func (g *Group) Usage() (spec.Usage, error) {
	u, err := g.h.usage(g.path)
	if err != nil {
		return spec.Usage{}, fmt.Errorf("cannot read the usage of the cgroup %s: %w", g.path, err)
	}
	u.Time = time.Now()
	if g.unified != "" { // its group has PSI even where v1 has the controllers
		u.CPUPressure = readPressure(filepath.Join(g.unified, "cpu.pressure"))
		u.MemoryPressure = readPressure(filepath.Join(g.unified, "memory.pressure"))
		u.IOPressure = readPressure(filepath.Join(g.unified, "io.pressure"))
	}
	return u, nil
}

// Delete kills the group's processes, waits (at most deleteTimeout, or until ctx is done) until they are gone and
// deletes it. Idempotent.
func (g *Group) Delete(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, deleteTimeout)
	defer cancel()
	poll := deletePollMin
	for {
		if err := g.Kill(); err != nil {
			return err
		}
		err := g.remove()
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("cannot delete the cgroup %s: %w", g.path, err)
		}
		select {
		case <-ctx.Done():
			pids, _ := g.Pids() // only for the message
			return fmt.Errorf("cannot delete the cgroup %s: processes %v do not end: %w", g.path, pids, ctx.Err())
		case <-time.After(poll):
			poll = min(2*poll, deletePollMax)
		}
	}
}

// remove deletes the group's directories, and what was made below them.
func (g *Group) remove() error {
	for _, dir := range g.h.dirs(g.path) {
		if err := removeTree(dir); err != nil {
			return err
		}
		fault.At("cgroup", "directory removed")
	}
	return nil
}

// removeTree deletes a cgroup's directory after those below it. Their files are the kernel's and go with them.
func removeTree(dir string) error {
	err := unix.Rmdir(dir)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	entries, rerr := os.ReadDir(dir)
	if rerr != nil {
		return err
	}
	below := false
	for _, e := range entries {
		if e.IsDir() {
			below = true
			if err := removeTree(filepath.Join(dir, e.Name())); err != nil {
				return err
			}
		}
	}
	if !below {
		return err
	}
	if err := unix.Rmdir(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// gone reports whether an error says that the group was deleted meanwhile.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV)
}
