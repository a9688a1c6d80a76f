package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/cgroups/v3/cgroup1"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/osthread"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// unifiedMount is where a hybrid host has its cgroup2 hierarchy: no controllers, but cgroup.kill.
	unifiedMount = root + "/unified"
	// killRounds bounds the fallback without cgroup.kill: everything is frozen while it is killed, so one round does it
	// unless a process was being forked just then.
	killRounds = 16
	// freezePolls and freezePause bound the wait for a group to freeze: 100 ms.
	freezePolls = 100
	freezePause = time.Millisecond
	blkio       = string(cgroup1.Blkio)
)

// optional controllers of v1: where they are mounted, and for cpuset where it was asked for (a group of its own costs every
// start), a group has a directory there too.
var optional = []struct{ name, reason string }{
	{blkio, "limits and counts input and output"},
	{string(cgroup1.Cpuset), "says which processors"},
}

// controllers of v1 that a group needs.
var controllers = []struct {
	name   cgroup1.Name
	reason string
}{
	{cgroup1.Cpu, "limits processor time"},
	{cgroup1.Cpuacct, "counts processor time"},
	{cgroup1.Memory, "limits and counts memory"},
	{cgroup1.Pids, "limits and counts processes"},
	{cgroup1.Devices, "says which device nodes work"},
	{cgroup1.Freezer, "holds a group still while it is killed, where there is no cgroup.kill"},
}

// v1 has one hierarchy per controller. With unified there is a cgroup2 hierarchy beside them, that only kills.
type v1 struct{ unified bool }

func subsystems() ([]cgroup1.Subsystem, error) {
	var memory cgroup1.Subsystem = cgroup1.NewMemory(root, cgroup1.OptionalSwap(), cgroup1.IgnoreModules("kmem", "kmem.tcp"))
	all := []cgroup1.Subsystem{cgroup1.NewCpu(root), cgroup1.NewCpuacct(root), memory, cgroup1.NewPids(root), cgroup1.NewDevices(root), cgroup1.NewFreezer(root)}
	for _, c := range controllers {
		if _, err := os.Stat(filepath.Join(root, string(c.name))); err != nil {
			return nil, spec.Errorf(spec.KindUnsupported, "cgroup controller %s is not mounted; it %s: mount it on %s/%s", c.name, c.reason, root, c.name)
		}
	}
	return all, nil
}

func (v v1) create(path string, l Limits) error {
	r := v1Resources(l)
	r.Devices = deviceRules(l.Devices)
	if _, err := cgroup1.New(cgroup1.StaticPath(path), r, cgroup1.WithHierarchy(subsystems)); err != nil {
		return err
	}
	if err := v.createOptional(path, l, r); err != nil {
		return err
	}
	if err := v.makeInner(path, l); err != nil {
		return err
	}
	if Mode() == ModeHybrid {
		return os.MkdirAll(filepath.Join(unifiedMount, path), 0o755)
	}
	return nil
}

func (v v1) prepare(path string, _ Limits) error {
	if !v.unified {
		return nil
	}
	return os.MkdirAll(filepath.Join(unifiedMount, path), 0o755)
}

func (v v1) complete(path string, l Limits) error { return v.create(path, l) }

// doors: a process may be elsewhere than the kernel's tasks of it are, and one that moves itself as a task does so without the
// lock that moving processes takes.
func (v1) doors(path string, l Limits) []string {
	var doors []string
	for _, c := range controllers {
		doors = append(doors, filepath.Join(root, string(c.name), path, "tasks"))
	}
	if l.CPUSet != "" {
		doors = append(doors, filepath.Join(root, string(cgroup1.Cpuset), path, "tasks"))
	}
	if exists(filepath.Join(root, blkio)) {
		doors = append(doors, filepath.Join(root, blkio, path, "tasks"))
	}
	return doors
}

func (v1) createOptional(path string, l Limits, r *specs.LinuxResources) error {
	if l.CPUSet != "" {
		if err := cgroup1.NewCpuset(root).Create(path, r); err != nil {
			return err
		}
	}
	if !exists(filepath.Join(root, blkio)) {
		return nil
	}
	if err := throttles(l.IO, r); err != nil {
		return err
	}
	return cgroup1.NewBlkio(root).Create(path, r)
}

// throttles adds l to r. A rate of zero lifts a limit.
func throttles(l IO, r *specs.LinuxResources) error {
	if l.Disk == "" {
		return nil
	}
	d, err := diskOf(l.Disk)
	if err != nil {
		if l.limited() {
			return err
		}
		return nil // nothing to limit there, and nothing was
	}
	throttle := func(rate uint64) []specs.LinuxThrottleDevice {
		t := specs.LinuxThrottleDevice{Rate: rate}
		t.Major, t.Minor = int64(d.major), int64(d.minor)
		return []specs.LinuxThrottleDevice{t}
	}
	r.BlockIO = &specs.LinuxBlockIO{
		ThrottleReadBpsDevice: throttle(l.ReadBPS), ThrottleReadIOPSDevice: throttle(uint64(l.ReadIOPS)),
		ThrottleWriteBpsDevice: throttle(l.WriteBPS), ThrottleWriteIOPSDevice: throttle(uint64(l.WriteIOPS)),
	}
	return nil
}

func v1Resources(l Limits) *specs.LinuxResources {
	r := &specs.LinuxResources{CPU: &specs.LinuxCPU{Cpus: l.CPUSet}}
	if l.CPUMillis > 0 {
		period := uint64(cpuPeriod)
		quota, shares := cpuQuota(l.CPUMillis), cpuShares(l.CPUMillis)
		r.CPU.Shares, r.CPU.Quota, r.CPU.Period = &shares, &quota, &period
	}
	if l.CPUWeight > 0 {
		shares := weightShares(l.CPUWeight)
		r.CPU.Shares = &shares
	}
	if l.MemoryBytes > 0 {
		limit := int64(l.MemoryBytes)
		r.Memory = &specs.LinuxMemory{Limit: &limit}
		if exists(filepath.Join(root, "memory/memory.memsw.limit_in_bytes")) {
			both := int64(l.MemoryBytes + l.SwapBytes)
			r.Memory.Swap = &both // memory and swap together
		}
	}
	if l.Pids > 0 {
		limit := int64(l.Pids)
		r.Pids = &specs.LinuxPids{Limit: &limit}
	}
	return r
}

// raiseMemory makes room for a higher limit: memory alone may never be above memory and swap together, and the library sets
// memory first.
func raiseMemory(path string, memory cgroup1.Subsystem, r *specs.LinuxResources) error {
	if r.Memory == nil || r.Memory.Swap == nil {
		return nil
	}
	now, err := readInts(filepath.Join(root, string(cgroup1.Memory), path, "memory.memsw.limit_in_bytes"))
	if err != nil {
		return err
	}
	if len(now) != 1 || int64(now[0]) >= *r.Memory.Swap {
		return nil
	}
	return updateV1(memory, path, &specs.LinuxResources{Memory: &specs.LinuxMemory{Swap: r.Memory.Swap}})
}

func updateV1(s cgroup1.Subsystem, path string, r *specs.LinuxResources) error {
	u, ok := s.(interface {
		Update(path string, resources *specs.LinuxResources) error
	})
	if !ok {
		return fmt.Errorf("cannot update controller %s", s.Name())
	}
	return u.Update(path, r)
}

func (v v1) update(path string, l Limits) error {
	r := v1Resources(l)
	var memory cgroup1.Subsystem = cgroup1.NewMemory(root, cgroup1.OptionalSwap(), cgroup1.IgnoreModules("kmem", "kmem.tcp"))
	if err := raiseMemory(path, memory, r); err != nil {
		return err
	}
	for _, s := range []cgroup1.Subsystem{cgroup1.NewCpu(root), memory, cgroup1.NewPids(root)} {
		if err := updateV1(s, path, r); err != nil {
			return err
		}
	}
	if err := updateInner(innerV1(path), l); err != nil {
		return err
	}
	if err := v.updateCPUSet(path, l.CPUSet, r); err != nil {
		return err
	}
	if !exists(filepath.Join(root, blkio, path)) {
		return nil // not mounted: nothing is limited there
	}
	if err := throttles(l.IO, r); err != nil {
		return err
	}
	return cgroup1.NewBlkio(root).Update(path, r)
}

// moveRounds bounds the moving of processes into a new group while they fork: a child starts where its parent is, so one
// round moves all but those forked during it.
const moveRounds = 16

// updateCPUSet gives a group its processors; empty means all. A group that began without gets its directory now.
func (v v1) updateCPUSet(path, cpus string, r *specs.LinuxResources) error {
	dir := filepath.Join(root, string(cgroup1.Cpuset), path)
	if cpus == "" {
		if !exists(dir) {
			return nil
		}
		all, err := os.ReadFile(filepath.Join(filepath.Dir(dir), "cpuset.cpus"))
		if err != nil {
			return err
		}
		return writeFile(filepath.Join(dir, "cpuset.cpus"), strings.TrimSpace(string(all)))
	}
	if err := cgroup1.NewCpuset(root).Create(path, r); err != nil {
		return err
	}
	for range moveRounds {
		all, err := processes(filepath.Join(root, string(cgroup1.Memory), path)) // which has none below it
		if err != nil {
			return err
		}
		inside, err := processes(dir)
		if err != nil {
			return err
		}
		outside := slices.DeleteFunc(all, func(pid int) bool { return slices.Contains(inside, pid) })
		if len(outside) == 0 {
			return nil
		}
		for _, pid := range outside {
			err := writeFile(filepath.Join(dir, "cgroup.procs"), strconv.Itoa(pid))
			if err != nil && !errors.Is(err, unix.ESRCH) { // it has ended
				return err
			}
		}
	}
	return errors.New("its processes fork faster than they can be moved: pause it and try again")
}

func (v v1) dirs(path string) []string {
	var dirs []string
	for _, c := range controllers {
		dirs = append(dirs, filepath.Join(root, string(c.name), path))
	}
	for _, c := range optional {
		dirs = append(dirs, filepath.Join(root, c.name, path))
	}
	if v.unified {
		dirs = append(dirs, filepath.Join(unifiedMount, path))
	}
	return dirs
}

// start moves a thread of the daemon's into the group, has it fork, and lets it die: v1 lets a thread be elsewhere than its
// process, and a child starts where its parent's thread is.
func (v v1) start(path string, attr *syscall.SysProcAttr, fn func(*syscall.SysProcAttr) error) error {
	return osthread.Run(func() error {
		for _, c := range controllers {
			tasks := filepath.Join(root, string(c.name), path, "tasks")
			if err := writeFile(tasks, "0"); err != nil { // 0 is the writing thread
				return fmt.Errorf("cannot enter a cgroup: %w", err)
			}
		}
		for _, c := range optional {
			tasks := filepath.Join(root, c.name, path, "tasks")
			if err := writeFile(tasks, "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("cannot enter a cgroup: %w", err)
			}
		}
		return fn(attr)
	})
}

func (v v1) kill(path string) error {
	if v.unified {
		err := writeFile(filepath.Join(unifiedMount, path, "cgroup.kill"), "1")
		if err == nil || !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		// No such file: a kernel before 5.14, or the group is gone, which the freezer then says.
	}
	return killFrozen(filepath.Join(root, string(cgroup1.Freezer), path))
}

// killFrozen kills all processes of a freezer group while they cannot fork.
func killFrozen(dir string) error {
	state := filepath.Join(dir, "freezer.state")
	for range killRounds {
		pids, err := processes(dir)
		if err != nil || len(pids) == 0 {
			return err
		}
		if err := writeFile(state, "FROZEN"); err != nil {
			return err
		}
		for range freezePolls {
			b, err := os.ReadFile(state)
			if err != nil {
				return err
			}
			if strings.TrimSpace(string(b)) == "FROZEN" {
				break
			}
			time.Sleep(freezePause)
		}
		pids, err = processes(dir)
		for _, pid := range pids {
			// The process cannot end and its number cannot be reused while it is frozen.
			if kerr := unix.Kill(pid, unix.SIGKILL); kerr != nil && !errors.Is(kerr, unix.ESRCH) {
				err = errors.Join(err, kerr)
			}
		}
		// Whatever happened: a killed process that stays frozen never ends.
		if err := errors.Join(err, writeFile(state, "THAWED")); err != nil {
			return err
		}
	}
	return nil
}

func (v1) usage(path string) (spec.Usage, error) {
	cg, err := cgroup1.Load(cgroup1.StaticPath(path), cgroup1.WithHierarchy(subsystems))
	if err != nil {
		return spec.Usage{}, err
	}
	m, err := cg.Stat()
	if err != nil {
		return spec.Usage{}, err
	}
	u := spec.Usage{
		CPUTime:          time.Duration(m.GetCPU().GetUsage().GetTotal()),
		CPUThrottled:     time.Duration(m.GetCPU().GetThrottling().GetThrottledTime()),
		MemoryBytes:      m.GetMemory().GetUsage().GetUsage(),
		MemoryPeakBytes:  m.GetMemory().GetUsage().GetMax(),
		MemoryCacheBytes: m.GetMemory().GetTotalCache(),
		MemoryLimitBytes: m.GetMemory().GetUsage().GetLimit(),
		OOMKills:         m.GetMemoryOomControl().GetOomKill(),
		Pids:             m.GetPids().GetCurrent(),
		PidsLimit:        m.GetPids().GetLimit(),
	}
	u.MemoryWorkingSetBytes = u.MemoryBytes - min(u.MemoryBytes, m.GetMemory().GetTotalInactiveFile())
	both := m.GetMemory().GetSwap().GetUsage() // memory and swap together; 0 where swap is not counted
	u.SwapBytes = both - min(both, u.MemoryBytes)
	for name, into := range map[string][2]*uint64{
		"io_service_bytes_recursive": {&u.IOReadBytes, &u.IOWriteBytes},
		"io_serviced_recursive":      {&u.IOReads, &u.IOWrites},
	} {
		b, err := os.ReadFile(filepath.Join(root, blkio, path, "blkio.throttle."+name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return spec.Usage{}, err
		}
		parseThrottle(string(b), into[0], into[1])
	}
	return u, nil
}

// processes are those with their first thread in the group at dir. The daemon's forking thread (see start) makes v1 list
// the daemon itself in cgroup.procs, but its first thread is not in tasks.
func processes(dir string) ([]int, error) {
	pids, err := readInts(filepath.Join(dir, "cgroup.procs"))
	if gone(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	tasks, err := readInts(filepath.Join(dir, "tasks"))
	if errors.Is(err, fs.ErrNotExist) {
		return pids, nil // v2 has no such file, nor such threads
	}
	if err != nil && !gone(err) {
		return nil, err
	}
	return slices.DeleteFunc(pids, func(pid int) bool { return !slices.Contains(tasks, pid) }), nil
}

func readInts(path string) ([]int, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	var ints []int
	for field := range strings.FieldsSeq(string(b)) {
		n, err := strconv.Atoi(field)
		if err != nil {
			return nil, fmt.Errorf("cannot parse %s: %w", path, err)
		}
		ints = append(ints, n)
	}
	return ints, nil
}

// writeFile writes to a file of the kernel's, which must exist: os.WriteFile's O_CREATE turns a missing one into EPERM.
func writeFile(path, value string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(value)
	return errors.Join(err, f.Close())
}
