package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/weaken"
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
	// What the cgroup and the id range are made under: see record.MadeAs.
	madeAs string
	// The image, open for reading; not the start's to close.
	imageFile *os.File

	rec      record
	base     uint32
	group    *cgroup.Group
	listener *os.File
	// Where the agent forks what the workload is: see cgroup.Group.InnerDoor. Nil where nothing is limited.
	innerDoor *os.File
	agent     *agentProcess
	layer     *os.File // a mount of the writable layer, attached nowhere
	fresh     bool     // the layer was made by this start
	root      *os.File
	held      held

	// What its root was made like ahead of time; nil if it was not.
	prepared *preparation
	// What the agent is to launch as it boots, nil for nothing, and what it said of that.
	launch   func(runtime.Launching) ([]byte, error)
	launched []byte
	instance *instance

	beside chan error // of a step that runs beside the others
}

// step is one thing a start does.
type step struct {
	name string
	run  func(*start, context.Context) error
	// For Probe: what the host lacks when this step fails, and what to do.
	advice string
	// Runs beside the steps after it, up to the first that awaits it.
	beside bool
	awaits bool
	// Asks nothing of the sandbox but the size of its layer: done ahead of time for those in the pool.
	ahead bool
	// Asks besides only for the image: done ahead of time where somebody is likely to want it.
	prepares bool
}

const (
	agentStep    = "agent"
	cgroupAdvice = "mount cgroup2 on /sys/fs/cgroup with the controllers cpu, memory and pids, or run sandboxd outside of a container that hides them"
)

// steps make a sandbox, in this order. What takes long goes side by side: the layer and the cgroup are made while the kernel
// makes the namespaces, the root file system while the agent's runtime initialises.
var steps = []step{
	{name: "record", run: (*start).writeRecord, ahead: true,
		advice: "check that the run directory is on a writable file system"},
	{name: "writable layer", run: (*start).attachLayer, beside: true, ahead: true,
		advice: "install e2fsprogs, load the kernel modules loop and ext4, check free space in the state directory"},
	{name: "ids", run: (*start).allocateIDs, ahead: true,
		advice: "check the directory of id ranges, and remove sandboxes that nobody needs"},
	{name: "unified cgroup", run: (*start).prepareGroup, ahead: true, advice: cgroupAdvice},
	{name: "fork", run: (*start).spawn, ahead: true,
		advice: "see that sandbox-agent is where sandboxd looks for it, and that sandboxd may start processes of its own program"},
	{name: "cgroup", run: (*start).makeGroup, ahead: true, advice: cgroupAdvice},
	{name: "socket", run: (*start).makeSocket, ahead: true,
		advice: "check that the run directory is on a file system that has sockets"},
	{name: "namespaces", run: (*start).enter, ahead: true,
		advice: "allow user namespaces: sysctl user.max_user_namespaces must be above 0; run sandboxd as root"},
	{name: "identity", run: (*start).identify, ahead: true,
		advice: "mount /proc of the host's pid namespace without hidepid"},
	{name: "apparmor", run: (*start).loadAppArmor, prepares: true,
		advice: "see what apparmor_parser says; install the package apparmor anew, or boot with apparmor=0 to do without"},
	{name: "root file system", run: (*start).buildRoot, awaits: true, prepares: true,
		advice: "use kernel 6.1 or newer with the modules erofs and overlay"},
	{name: agentStep, run: (*start).introduce,
		advice: "check that sandbox-agent and sandboxd are of the same version"},
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
	i, _, err := r.Launch(ctx, s, nil)
	return i, err
}

// Launch implements runtime.Launcher. A nil message launches nothing.
func (r *Runtime) Launch(ctx context.Context, s spec.Sandbox, message func(runtime.Launching) ([]byte, error)) (runtime.Instance, []byte, error) {
	if err := validate(s); err != nil {
		return nil, nil, err
	}
	img, err := openImage(s.ImagePath)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot start sandbox %s: %w", s.ID, err)
	}
	defer img.Close() //nolint:errcheck // only read; the mount has its own reference
	st, err := r.start(ctx, s, img, message)
	if err != nil {
		return nil, nil, err
	}
	return st.instance, st.launched, nil
}

// start answers with the finished start.
func (r *Runtime) start(ctx context.Context, s spec.Sandbox, img *os.File, message func(runtime.Launching) ([]byte, error)) (*start, error) {
	r.pool.note()
	defer r.pool.note()
	if st := r.pool.take(s, img); st != nil {
		err := r.finish(ctx, st, s, img, message)
		if !errors.Is(err, errTaken) {
			return st, err
		}
	}
	// Outside of the steps: what exists already is not this start's to undo.
	if err := newDir(r.dir(s.ID)); err != nil {
		if errors.Is(err, fs.ErrExist) {
			return nil, spec.Errorf(spec.KindAlreadyExists, "cannot start sandbox %s: it, or something of it, exists; remove or release it first", s.ID)
		}
		return nil, fmt.Errorf("cannot start sandbox %s: %w", s.ID, err)
	}
	fault.At("container start", "directory made")
	st := &start{r: r, s: s, madeAs: s.ID, imageFile: img, launch: message}
	defer st.close()
	for _, step := range steps {
		if err := st.do(ctx, step); err != nil {
			return nil, errors.Join(err, st.undo(ctx))
		}
	}
	return st, nil
}

// do runs one step, or begins it if it runs beside others. Its error says which step failed.
func (st *start) do(ctx context.Context, s step) error {
	if s.awaits {
		if err := st.await(); err != nil {
			return err
		}
	}
	run := func() error {
		err := ctx.Err()
		if err == nil {
			end := phase.Begin(st.s.ID, "start: "+s.name)
			err = s.run(st, ctx)
			end()
			fault.At("container start", s.name)
		}
		if err != nil {
			name := s.name
			if e := (*agentError)(nil); errors.As(err, &e) {
				name = agentStep // which runs beside those after its fork
			}
			return &stepError{name, fmt.Errorf("cannot start sandbox %s: %w", st.s.ID, err)}
		}
		return nil
	}
	if !s.beside {
		return run()
	}
	st.beside = make(chan error, 1)
	go func() { st.beside <- run() }() // await, which undo calls too, waits for it
	return nil
}

// await waits for the step that runs beside the others, if one does.
func (st *start) await() error {
	if st.beside == nil {
		return nil
	}
	err := <-st.beside
	st.beside = nil
	return err
}

// undo leaves nothing of a failed start, and a layer that was there before.
func (st *start) undo(ctx context.Context) error {
	_ = st.await() // the first error counts
	if st.agent != nil {
		st.agent.abandon()
		st.agent = nil
	}
	st.close() // the root file system holds the layer
	return st.r.destroy(ctx, st.s.ID, st.fresh)
}

// close gives back what only the making needed. After success the instance has the rest.
func (st *start) close() {
	for _, f := range []**os.File{&st.listener, &st.innerDoor, &st.layer, &st.root, &st.held.mounts} {
		if *f != nil {
			_ = (*f).Close() // the agent has its own copies
			*f = nil
		}
	}
	if l := st.held.layer; l != nil {
		close(l.quiet) // of a start that failed, whose agent is gone
		st.held.layer = nil
	}
	if st.held.image != nil {
		image := st.held.image
		st.r.mounts.doIfRunning(func() { st.r.mounts.leaveImage(image) })
		st.held.image = nil
	}
}

func (st *start) writeRecord(context.Context) error {
	st.rec = record{
		ID: st.s.ID, CgroupParent: st.r.config.CgroupParent, MadeAs: st.madeAs,
		DiskBytes: st.s.Resources.DiskBytes, PidsLimit: st.s.Resources.Pids, Direct: st.s.Resources.LimitsWrites(),
	}
	return writeRecord(st.r.dir(st.s.ID), st.rec)
}

func (st *start) allocateIDs(context.Context) (err error) {
	st.base, err = st.r.config.IDs.Allocate(st.madeAs)
	if weaken.Without("ids of its own") {
		st.base = 0 // the host's
	}
	return err
}

func (st *start) limits() cgroup.Limits {
	limits := st.r.limits(st.s.Resources)
	if weaken.Without("list of devices") {
		limits.Devices = nil
	}
	if weaken.Without("room for the agent") {
		limits.InnerPids = 0
	}
	if weaken.Without("limits of the cgroup") {
		limits = cgroup.Limits{Devices: limits.Devices}
	}
	return limits
}

func (st *start) prepareGroup(context.Context) (err error) {
	st.group, err = cgroup.Prepare(st.r.config.CgroupParent, st.madeAs, st.limits())
	return err
}

func (st *start) makeGroup(context.Context) (err error) {
	limits := st.limits()
	if err := st.group.Complete(limits); err != nil || limits.InnerPids == 0 {
		return err
	}
	st.innerDoor, err = st.group.InnerDoor()
	return err
}

// bootFiles go to the agent with its first boot message.
func (st *start) bootFiles() []*os.File {
	files := []*os.File{st.root, st.listener}
	if st.innerDoor != nil {
		files = append(files, st.innerDoor)
	}
	return files
}

func (st *start) makeSocket(context.Context) (err error) {
	st.listener, err = listen(st.r.dir(st.s.ID))
	return err
}

func (st *start) loadAppArmor(ctx context.Context) (err error) {
	st.rec.AppArmor, err = st.r.appArmor.profile(ctx)
	return err
}

// spawn has the agent's process forked, and does not wait for it.
func (st *start) spawn(context.Context) error {
	program, err := st.r.agent.open()
	if err != nil {
		return err
	}
	unified, err := st.group.Unified()
	if err != nil {
		return err
	}
	if unified != nil {
		defer unified.Close() //nolint:errcheck // a path descriptor
	}
	st.agent, err = st.r.spawner.startAgent(program, spawnRequest{Base: st.base, Doors: st.group.DoorCount(st.limits())}, unified)
	return err
}

// enter has the process, in its namespaces, enter its cgroup and become the agent.
func (st *start) enter(ctx context.Context) error {
	if err := st.agent.arrived(); err != nil {
		return err
	}
	doors, err := st.group.Doors(st.limits())
	if err != nil {
		return err
	}
	defer closeAll(doors) //nolint:errcheck // nothing was written to them
	return st.agent.goOn(ctx, doors)
}

// attachLayer mounts the writable layer; it makes, or repairs, the layer first. Beside the other steps: where there is no spare
// one, the kernel marks the file system as in use and waits until the mark has reached the disk.
func (st *start) attachLayer(ctx context.Context) error {
	stateDir, size := st.r.config.StateDir, st.s.Resources.DiskBytes
	// Known before it is made: if that fails half-way, the half goes too.
	_, err := os.Lstat(layerDir(stateDir, st.s.ID))
	st.fresh = errors.Is(err, fs.ErrNotExist)
	var l *layer
	if st.fresh {
		if l, err = st.r.layers.spare(st.s.ID, size); err != nil {
			return err
		}
	}
	if l == nil {
		st.r.layers.settle(st.s.ID) // of an end so short ago that it is mounted yet
		path, created, err := st.r.config.Disk.Layer(stateDir, st.s.ID, name, size)
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
		fault.At("container start", "layer there")
		if l, err = st.r.layers.mountFile(st.s.ID, path, size); err != nil {
			return err
		}
	}
	st.held.layer = l
	if err := st.r.layers.setDirect(st.s.ID, st.s.Resources.LimitsWrites()); err != nil {
		return err
	}
	if st.layer, err = l.again(); err != nil {
		return fmt.Errorf("cannot mount the writable layer: %w", err)
	}
	return nil
}

func (st *start) buildRoot(ctx context.Context) error {
	userns, err := st.agent.namespace(ctx, "user")
	if err != nil {
		return err
	}
	defer userns.Close() //nolint:errcheck // only looked at
	return st.r.mounts.do(func() (err error) {
		st.root, st.held.image, err = st.r.mounts.build(rootfs{
			id: st.s.ID, image: st.imageFile, layer: st.layer, userns: userns, base: st.base,
		})
		return err
	})
}

// identify finds out what tells the agent's process from others, and takes hold of its mounts.
func (st *start) identify(ctx context.Context) (err error) {
	st.rec.PID = st.agent.pid
	st.rec.StartTime, err = processStartTime(st.agent.pid)
	if errors.Is(err, errProcessGone) {
		return st.agent.explainEnd(ctx, "cannot identify the agent")
	}
	if err != nil {
		return err
	}
	st.held.mounts, err = st.agent.namespace(ctx, "mnt") // its last look: the number was the agent's
	return err
}

// introduce gives the sandbox its record, and the agent its root, its socket and what to launch. In this order: a daemon that
// comes after this one asks whom the record names whether the workload runs.
func (st *start) introduce(ctx context.Context) (err error) {
	st.rec.Ready, st.rec.IDBase = true, st.base
	if err := writeRecord(st.r.dir(st.s.ID), st.rec); err != nil {
		return err
	}
	fault.At("container start", "known")
	var launch []byte
	dir, done := st.r.dir(st.s.ID), make(chan struct{})
	if st.launch != nil {
		launching := runtime.Launching{Facts: st.rec.facts(), Dial: func(ctx context.Context) (net.Conn, error) { return dial(ctx, dir) }, Done: done}
		if launch, err = st.launch(launching); err != nil {
			return err
		}
	}
	if st.prepared != nil {
		st.launched, err = st.agent.introducePrepared(ctx, launch)
	} else {
		st.launched, err = st.agent.introduce(ctx, st.bootFiles(), launch)
	}
	if err != nil {
		return err
	}
	fault.At("container start", "agent has its root")
	_ = st.agent.boot.Close() // the agent closed its end
	st.held.crash = st.agent.crash
	st.instance = st.r.newInstance(st.rec, st.agent.pidfd, st.group, st.held, done)
	st.agent, st.held = nil, held{} // the instance's now
	st.r.mu.Lock()
	st.r.instances[st.s.ID] = st.instance
	st.r.mu.Unlock()
	return nil
}
