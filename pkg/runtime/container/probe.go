package container

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// probeTimeout bounds Probe; it takes some ten milliseconds.
const probeTimeout = 30 * time.Second

// Results of a runtime.Check.
const (
	resultOK     = "ok"
	resultFailed = "failed"
)

// Probe makes a sandbox over an empty image and removes it: what is looked at is what a Start does, nothing less.
func (r *Runtime) Probe(ctx context.Context) runtime.Availability {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	a := runtime.Availability{AgentTransport: "unix"}
	begin := time.Now()
	failed, err := r.probe(ctx)
	took := time.Since(begin).Round(time.Millisecond)
	for _, step := range steps {
		c := runtime.Check{Name: name + ": " + step.name, Result: resultOK, Finding: findings[step.name]()}
		if step.name == failed {
			c.Result, c.Finding, c.Advice = resultFailed, err.Error(), step.advice
		}
		a.Checks = append(a.Checks, c)
		if step.name == failed {
			break // those after it were not tried
		}
	}
	if err != nil {
		if failed == "" {
			a.Checks = append(a.Checks, runtime.Check{Name: name + ": cleanup", Result: resultFailed, Finding: err.Error(), Advice: "see the daemon's log; remove what is left by hand"})
		}
		a.Reason = fmt.Sprintf("a trial sandbox could not be made: %v", err)
		return a
	}
	a.Available = true
	a.Reason = fmt.Sprintf("a trial sandbox was made and removed in %v", took)
	return a
}

// findings say what a step that worked shows of the host.
var findings = map[string]func() string{
	"record":         func() string { return "run directory is writable" },
	"ids":            func() string { return "a range of host ids is free" },
	"unified cgroup": func() string { return "cgroup " + cgroup.Mode() + " can be written to" },
	"fork":           func() string { return "processes can be forked" },
	"cgroup":         func() string { return "cgroup " + cgroup.Mode() + " limits processor time, memory and processes" },
	"socket":         func() string { return "agent's socket can be bound" },
	"namespaces":     func() string { return "agent starts in new user, pid, mount, net, ipc, uts and cgroup namespaces" },
	"writable layer": func() string { return "ext4 on a loop device" },
	"identity":       func() string { return "processes can be told from others" },
	"apparmor": func() string {
		if why := (*appArmor)(nil).missing(); why != "" {
			return "no AppArmor profile: " + why
		}
		return "AppArmor profile " + appArmorProfile + " is loaded"
	},
	"root file system": func() string { return "writable overlay over an EROFS image, both with shifted ids" },
	"agent":            func() string { return "agent attaches its root and serves" },
}

// probe answers with the step that failed, empty if none or if only the removal failed.
func (r *Runtime) probe(ctx context.Context) (string, error) {
	image, err := emptyImage(r.config.StateDir)
	if err != nil {
		return steps[0].name, err
	}
	defer image.Close() //nolint:errcheck // it has no name
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		return steps[0].name, err
	}
	s := spec.Sandbox{
		ID:        hex.EncodeToString(id[:]),
		ImagePath: image.Name(),
		Resources: spec.Resources{CPUMillis: 1000, MemoryBytes: 64 << 20, Pids: 64, DiskBytes: 16 << 20},
	}
	r.hide(s.ID, true)
	defer r.hide(s.ID, false)
	_, err = r.start(ctx, s, image, nil)
	var failed *stepError
	if errors.As(err, &failed) {
		return failed.step, err
	}
	if err != nil {
		return steps[0].name, err
	}
	return "", r.destroy(ctx, s.ID, true)
}

// hide keeps a sandbox from List, so that nobody takes it for something left behind. One that really was left
// behind, by a daemon that died, is named by the next.
func (r *Runtime) hide(id string, on bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if on {
		r.hidden[id] = true
	} else {
		delete(r.hidden, id)
	}
}

// emptyImage is an EROFS file with an empty root directory. It lies where images lie, since not every file system can
// have one mounted without a loop device, but has no name there.
func emptyImage(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the state directory: %w", err)
	}
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot make an image for the trial: %w", err)
	}
	rw := os.NewFile(uintptr(fd), dir)
	defer rw.Close() //nolint:errcheck // reopened read-only below
	if _, err := rw.Write(emptyEROFS()); err != nil {
		return nil, fmt.Errorf("cannot write an image for the trial: %w", err)
	}
	f, err := os.Open(fdPath(rw))
	if err != nil {
		return nil, fmt.Errorf("cannot open the image for the trial: %w", err)
	}
	return f, nil
}

// emptyEROFS is one block of the format described in the kernel's Documentation/filesystems/erofs.rst and
// fs/erofs/erofs_fs.h: a superblock at 1024, one compact inode after it, its directory entries inline.
func emptyEROFS() []byte {
	const (
		block, blockBits = 4096, 12
		super            = 1024
		superSize        = 128
		inode            = super + superSize
		inodeSize        = 32
		nid              = inode / inodeSize
		entries          = inode + inodeSize
		entrySize        = 12
		names            = "." + ".."
		typeDir          = 2
		layoutInline     = 2 << 1 // bits 1 to 3 of i_format: the data follows the inode
	)
	b := make([]byte, block)
	le := binary.LittleEndian
	le.PutUint32(b[super:], 0xE0F5E1E2) // magic
	b[super+12] = blockBits
	le.PutUint16(b[super+14:], nid) // root
	le.PutUint64(b[super+16:], 1)   // inodes
	le.PutUint32(b[super+36:], 1)   // blocks
	le.PutUint16(b[inode:], layoutInline)
	le.PutUint16(b[inode+4:], unix.S_IFDIR|0o755)
	le.PutUint16(b[inode+6:], 2) // links
	le.PutUint32(b[inode+8:], 2*entrySize+uint32(len(names)))
	le.PutUint32(b[inode+20:], 1) // inode number, for stat of 32 bits
	for i, nameOffset := range []uint16{2 * entrySize, 2*entrySize + 1} {
		e := b[entries+i*entrySize:]
		le.PutUint64(e, nid) // the root is its own parent
		le.PutUint16(e[8:], nameOffset)
		e[10] = typeDir
	}
	copy(b[entries+2*entrySize:], names)
	return b
}
