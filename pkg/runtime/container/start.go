package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// devices are all that a sandbox may open. A user namespace may make no nodes, and file systems in it have none; but an
// image may bring one, and who may mount in the sandbox could make it work. This holds whatever is mounted.
var devices = []cgroup.Device{
	{Major: 1, Minor: 3, Reason: "/dev/null"},
	{Major: 1, Minor: 5, Reason: "/dev/zero"},
	{Major: 1, Minor: 7, Reason: "/dev/full"},
	{Major: 1, Minor: 8, Reason: "/dev/random"},
	{Major: 1, Minor: 9, Reason: "/dev/urandom"},
	{Major: 5, Minor: 0, Reason: "/dev/tty: the opener's own terminal"},
	{Major: 5, Minor: 2, Reason: "/dev/ptmx: terminals of the sandbox's own devpts"},
	{Major: 136, Minor: cgroup.AnyMinor, Reason: "/dev/pts/*: the same"},
}

// start is a sandbox being made.
type start struct {
	r *Runtime
	s spec.Sandbox
	// The image, open for reading; not the start's to close.
	imageFile *os.File

	rec      record
	base     uint32
	group    *cgroup.Group
	listener *os.File
	agent    *agentProcess
	layer    *os.File // the loop device
	fresh    bool     // the layer was made by this start
	root     *os.File
	image    *image

	instance *instance
}

// step is one thing a start does.
type step struct {
	name string
	run  func(*start, context.Context) error
	// For Probe: what the host lacks when this step fails, and what to do.
	advice string
}

// steps make a sandbox, in this order. The agent is forked early: while its runtime initialises, the daemon makes the
// root file system on another processor.
var steps = []step{
	{"record", (*start).writeRecord, "check that the run directory is on a writable file system"},
	{"ids", (*start).allocateIDs, "check the directory of id ranges, and remove sandboxes that nobody needs"},
	{"cgroup", (*start).makeGroup, "mount cgroup2 on /sys/fs/cgroup with the controllers cpu, memory and pids, or run sandboxd outside of a container that hides them"},
	{"socket", (*start).makeSocket, "check that the run directory is on a file system that has sockets"},
	{"namespaces", (*start).spawn, "allow user namespaces: sysctl user.max_user_namespaces must be above 0; run sandboxd as root"},
	{"writable layer", (*start).attachLayer, "install e2fsprogs, load the kernel modules loop and ext4, check free space in the state directory"},
	{"root file system", (*start).buildRoot, "use kernel 6.1 or newer with the modules erofs and overlay"},
	{"agent", (*start).introduce, "check that sandbox-agent and sandboxd are of the same version"},
}

// stepError says which step failed.
type stepError struct {
	step string
	err  error
}

func (e *stepError) Error() string { return e.err.Error() }
func (e *stepError) Unwrap() error { return e.err }

// Start makes a sandbox and waits until its agent serves. A writable layer left by an earlier start of the same id is used.
func (r *Runtime) Start(ctx context.Context, s spec.Sandbox) (runtime.Instance, error) {
	if err := validate(s); err != nil {
		return nil, err
	}
	img, err := openImage(s.ImagePath)
	if err != nil {
		return nil, fmt.Errorf("cannot start sandbox %s: %w", s.ID, err)
	}
	defer img.Close() //nolint:errcheck // only read; the mount has its own reference
	i, err := r.start(ctx, s, img)
	if err != nil {
		return nil, err // not i: a nil *instance is no nil Instance
	}
	return i, nil
}

func (r *Runtime) start(ctx context.Context, s spec.Sandbox, img *os.File) (*instance, error) {
	// Outside of the steps: what exists already is not this start's to undo.
	if err := newDir(r.dir(s.ID)); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil, spec.Errorf(spec.KindAlreadyExists, "cannot start sandbox %s: it, or something of it, exists; remove or release it first", s.ID)
		}
		return nil, fmt.Errorf("cannot start sandbox %s: %w", s.ID, err)
	}
	st := &start{r: r, s: s, imageFile: img}
	defer st.close()
	for _, step := range steps {
		err := ctx.Err()
		if err == nil {
			err = step.run(st, ctx)
		}
		if err == nil {
			continue
		}
		err = &stepError{step.name, fmt.Errorf("cannot start sandbox %s: %w", s.ID, err)}
		return nil, errors.Join(err, st.undo(ctx))
	}
	return st.instance, nil
}

// undo leaves nothing of a failed start, and a layer that was there before.
func (st *start) undo(ctx context.Context) error {
	if st.agent != nil {
		st.agent.abandon()
		st.agent = nil
	}
	st.close() // the root file system holds the layer
	return st.r.destroy(ctx, st.s.ID, st.fresh)
}

// close gives back what only the making needed. After success the instance has the rest.
func (st *start) close() {
	for _, f := range []**os.File{&st.listener, &st.layer, &st.root} {
		if *f != nil {
			_ = (*f).Close() // the agent has its own copies
			*f = nil
		}
	}
	if st.image != nil {
		_ = st.r.mounts.do(func() error { return st.r.mounts.leaveImage(st.image) }) // of a start that failed: its error counts
		st.image = nil
	}
}

func (st *start) writeRecord(context.Context) error {
	st.rec = record{ID: st.s.ID, CgroupParent: st.r.config.CgroupParent, DiskBytes: st.s.Resources.DiskBytes, PidsLimit: st.s.Resources.Pids}
	return writeRecord(st.r.dir(st.s.ID), st.rec)
}

func (st *start) allocateIDs(context.Context) (err error) {
	st.base, err = st.r.config.IDs.Allocate(st.s.ID)
	return err
}

func (st *start) makeGroup(context.Context) (err error) {
	st.group, err = cgroup.New(st.r.config.CgroupParent, st.s.ID, cgroup.Limits{
		CPUMillis:   st.s.Resources.CPUMillis,
		MemoryBytes: st.s.Resources.MemoryBytes,
		Pids:        st.s.Resources.Pids + agentPids,
		Devices:     devices,
	})
	return err
}

func (st *start) makeSocket(context.Context) (err error) {
	st.listener, err = listen(st.r.dir(st.s.ID))
	return err
}

func (st *start) spawn(context.Context) error {
	program, err := st.r.agent.open()
	if err != nil {
		return err
	}
	st.agent, err = spawn(program, st.group, st.base)
	return err
}

// attachLayer puts the writable layer on a loop device; it makes, or repairs, the layer first.
func (st *start) attachLayer(ctx context.Context) error {
	// Known before it is made: if that fails half-way, the half goes too.
	_, err := os.Lstat(disk.LayerPath(st.r.config.StateDir, st.s.ID))
	st.fresh = errors.Is(err, fs.ErrNotExist)
	path, created, err := st.r.config.Disk.Layer(st.r.config.StateDir, st.s.ID, name, st.s.Resources.DiskBytes)
	if err != nil {
		return err
	}
	if !created {
		// Of a daemon that died between the end of a sandbox and its release: two mounts of one layer would destroy it.
		if err := disk.WaitDetached(ctx, path); err != nil {
			return err
		}
		if err := disk.Repair(ctx, path); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("cannot open the writable layer: %w", err)
	}
	defer f.Close() //nolint:errcheck // the loop device has its own reference
	st.layer, err = disk.AttachLoop(f, false)
	return err
}

func (st *start) buildRoot(context.Context) error {
	// The agent has not been reaped: its number is its own.
	userns, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", st.agent.pid))
	if err != nil {
		return fmt.Errorf("cannot open the sandbox's user namespace: %w", err)
	}
	defer userns.Close() //nolint:errcheck // only looked at
	return st.r.mounts.do(func() (err error) {
		st.root, st.image, err = st.r.mounts.build(rootfs{
			id: st.s.ID, image: st.imageFile, layer: st.layer, userns: userns, base: st.base, fresh: st.fresh,
		})
		return err
	})
}

// introduce gives the agent its root and its socket, and the sandbox its record.
func (st *start) introduce(ctx context.Context) error {
	if err := st.agent.introduce(ctx, st.root, st.listener); err != nil {
		return err
	}
	started, err := processStartTime(st.agent.pid)
	if err != nil {
		return err
	}
	st.rec.Ready, st.rec.PID, st.rec.StartTime = true, st.agent.pid, started
	if err := writeRecord(st.r.dir(st.s.ID), st.rec); err != nil {
		return err
	}
	_ = st.agent.boot.Close() // the agent closed its end
	st.instance = st.r.newInstance(st.rec, st.agent.pidfd, st.group, st.agent.crash, st.image)
	st.agent, st.image = nil, nil // the instance's now
	st.r.mu.Lock()
	st.r.instances[st.s.ID] = st.instance
	st.r.mu.Unlock()
	return nil
}
