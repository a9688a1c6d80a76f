package microvm

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/console"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// bootTimeout bounds a start. Seen: 1.2 s under TCG alone on a machine; the rest is for many starts at once on a
	// small one.
	bootTimeout = 2 * time.Minute
	// undoTimeout bounds taking down a start that failed, when the caller may have gone.
	undoTimeout = 20 * time.Second
	// maxVMMPids bounds QEMU's threads and the helper's: one per CPU, up to 64 for disk I/O, a handful more.
	maxVMMPids = 256
	// minGuestMemory is a little more than the 80 MiB with which Debian's cloud kernel and our initramfs were seen to boot.
	minGuestMemory = 96 << 20
	// maxCPUs is what QEMU's microvm machine takes.
	maxCPUs = 255
)

// vmmOverhead is what a VM may use beyond its guest's memory, by accelerator: the cgroup limits both together, and a
// guest that keeps to its memory must never be killed for it. Measured as the group's peak less the guest's memory with
// every page of the guest touched, and doubled.
var vmmOverhead = map[string]uint64{
	accelKVM: 96 << 20,
	accelTCG: 96<<20 + tcgBufferMiB<<20,
}

// vmmDevices are the device nodes QEMU and the helper may open; disks and vsock come as open descriptors.
var vmmDevices = []cgroup.Device{
	{Major: 1, Minor: 3, Reason: "/dev/null"},
	{Major: 1, Minor: 5, Reason: "/dev/zero: memory, in some libraries"},
	{Major: 1, Minor: 8, Reason: "/dev/random"},
	{Major: 1, Minor: 9, Reason: "/dev/urandom"},
	{Major: 10, Minor: 232, Reason: "/dev/kvm"},
}

// boot is one start in the making.
type boot struct {
	r *Runtime
	// Without an image there are no disks: such a guest only tries out KVM.
	sandbox spec.Sandbox
	guest   *guest
	accel   string
	timeout time.Duration
	// Set for a guest that becomes a template, or for one that is cloned from one.
	making *making
	clone  *template
	// A clone that is made ahead of time.
	ahead bool
	// Set for a guest that goes on from a snapshot.
	restore *restoring
	// Why it is booted although there was a template.
	note string

	dir       string
	rec       record
	uid       uint32
	group     *cgroup.Group
	transport transport
	layer     string
	// Whether this start made the layer.
	newLayer bool
	voices   *voices
	initrd   *os.File
	// Nothing without a network.
	card networkCard
	// Open files that only the start needs.
	files []*os.File
}

// Start implements runtime.Runtime.
func (r *Runtime) Start(ctx context.Context, s spec.Sandbox) (runtime.Instance, error) {
	if err := checkID(s.ID); err != nil {
		return nil, err
	}
	if err := checkMemory(s.Resources); err != nil {
		return nil, err
	}
	accel, err := r.accelerator(ctx)
	if err != nil {
		return nil, err
	}
	g, err := r.guest()
	if err != nil {
		return nil, fmt.Errorf("cannot start microVM: %w", err)
	}
	if spec.Joins(s.Network) && g.networkErr != nil {
		return nil, spec.Errorf(spec.KindUnsupported, "cannot start microVM with a network: %w; name a kernel that has it with --vm-kernel, or use network none", g.networkErr)
	}
	i, err := r.startFrom(ctx, s, g, accel)
	if err != nil {
		return nil, fmt.Errorf("cannot start microVM: %w", err)
	}
	return i, nil
}

func checkMemory(r spec.Resources) error {
	if r.MemoryBytes < minGuestMemory {
		return spec.Invalidf("spec.resources.memory_bytes", "a microVM's guest does not boot with %d MiB of memory, give it %d or more", r.MemoryBytes>>20, minGuestMemory>>20)
	}
	return nil
}

// run boots the VM until its agent has been heard. If it fails, nothing is left.
func (b *boot) run(ctx context.Context) (*instance, error) {
	ctx, cancel := context.WithTimeout(ctx, b.timeout)
	defer cancel()
	defer b.closeFiles()

	b.dir = b.r.dir(b.sandbox.ID)
	if err := os.Mkdir(b.dir, 0o700); errors.Is(err, fs.ErrExist) {
		return nil, spec.Errorf(spec.KindAlreadyExists, "something of it is on the host: remove it first")
	} else if err != nil {
		return nil, err
	}
	fault.At("vm start", "directory made")
	end := phase.Begin(b.sandbox.ID, "start: build the VM")
	i, err := b.build(ctx)
	end()
	if err == nil {
		end := phase.Begin(b.sandbox.ID, b.bootPhase())
		err = b.awaitAgent(ctx, i)
		end()
		fault.At("vm start", "agent heard")
	}
	if err == nil {
		return i, nil
	}
	// First what we hold: the kernel's vsock device has a thread in the VM's cgroup for as long as anyone has it open.
	b.closeFiles()
	undo, cancelUndo := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancelUndo()
	return nil, errors.Join(err, b.r.destroy(undo, b.sandbox.ID, !b.newLayer))
}

func (b *boot) closeFiles() {
	for _, f := range b.files {
		_ = f.Close() // only read, or in memory
	}
	b.files = nil
}

// keep makes run close f.
func (b *boot) keep(f *os.File, err error) (*os.File, error) {
	if err == nil {
		b.files = append(b.files, f)
	}
	return f, err
}

// build makes everything of the VM and starts its processes. What it leaves when it fails, destroy finds.
func (b *boot) build(ctx context.Context) (i *instance, err error) {
	token := bootToken{}
	if b.making == nil {
		if _, err := rand.Read(token[:]); err != nil {
			return nil, fmt.Errorf("cannot draw a boot token: %w", err)
		}
	}
	ends, err := b.makeTransport(token)
	if err != nil {
		return nil, err
	}
	b.files = append(append(b.files, ends.QEMU), ends.Helper...)
	defer func() {
		if err != nil {
			err = errors.Join(err, b.transport.Close())
		}
	}()
	fault.At("vm start", "transport made")
	b.rec = record{
		ID: b.sandbox.ID, MadeAs: b.sandbox.ID, CgroupParent: b.r.cfg.CgroupParent, Accelerator: b.accel, Transport: b.transport.Record(),
		Token: hexToken(token), HasDisks: b.hasDisks(), ConsolePath: b.sandbox.ConsolePath,
		StartedFrom: b.startedFrom(), StartNote: b.note, SharedBytes: b.clone.sharedBytes(),
		DirectDisk: b.sandbox.Resources.LimitsWrites(), Waits: b.ahead, Networked: spec.Joins(b.sandbox.Network),
	}
	b.rec.CPUs, b.rec.MemoryBytes = b.shape()
	if err := b.rec.save(b.dir); err != nil {
		return nil, err
	}
	fault.At("vm start", "recorded")
	if b.uid, err = b.r.cfg.IDs.Allocate(b.sandbox.ID); err != nil {
		return nil, err
	}
	fault.At("vm start", "ids")
	b.group, err = cgroup.New(b.r.cfg.CgroupParent, b.sandbox.ID, b.r.limits(b.sandbox.Resources, b.accel, b.rec.SharedBytes))
	if err != nil {
		return nil, err
	}
	fault.At("vm start", "cgroup")
	if err := b.makeWorkDir(); err != nil {
		return nil, err
	}
	fault.At("vm start", "work directory")
	b.voices = &voices{}
	if b.voices.log, err = console.Open(b.sandbox.ConsolePath); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && i == nil {
			err = errors.Join(err, b.voices.end())
		}
	}()
	end := phase.Begin(b.sandbox.ID, "start: layer")
	err = b.makeLayer(ctx)
	end()
	if err != nil {
		return nil, err
	}
	fault.At("vm start", "layer")
	defer phase.Begin(b.sandbox.ID, "start: helper and QEMU")()
	return b.startProcesses(token, ends)
}

// bootPhase names the wait for the guest's agent.
func (b *boot) bootPhase() string {
	switch {
	case b.clone != nil:
		return "start: guest goes on from the template"
	case b.restore != nil:
		return "start: guest goes on from the snapshot"
	}
	return "start: guest boots"
}

// boots reports whether its guest starts at its beginning.
func (b *boot) boots() bool { return b.clone == nil && b.restore == nil }

// shape is what its guest has, or had when its state was taken.
func (b *boot) shape() (cpus uint32, memory uint64) {
	if b.restore != nil {
		return b.restore.meta.CPUs, b.restore.meta.MemoryBytes
	}
	return vcpus(b.sandbox.Resources.CPUMillis), guestBytes(b.sandbox.Resources)
}

func (b *boot) hasDisks() bool { return b.sandbox.ImagePath != "" }

func (b *boot) makeTransport(token bootToken) (ends transportFiles, err error) {
	switch {
	case b.clone != nil:
		token = bootToken{} // until it is adopted
	case b.restore != nil:
		token = b.restore.token // likewise
	}
	switch {
	case b.sandbox.Snapshots && b.making == nil && b.clone == nil:
		b.transport, ends, err = newPort(b.dir, token)
	case b.r.hub != nil:
		b.transport, ends, err = b.r.hub.newTransport(token)
	case b.clone != nil || b.making != nil:
		b.transport, ends, err = newPort(b.dir, token)
	default:
		b.transport, ends, err = newVhostUser(b.dir, token)
	}
	return ends, err
}

// makeWorkDir makes the directory on which jails are built.
func (b *boot) makeWorkDir() error {
	if err := os.Mkdir(b.workDir(), 0o500); err != nil {
		return fmt.Errorf("cannot make a directory for jails: %w", err)
	}
	return nil
}

func (b *boot) workDir() string { return filepath.Join(b.dir, "work") }

// jail is the jail of a program that is linked against the host's libraries, and of more.
func (b *boot) jail(program string, more ...jailed) (*jail, error) {
	rows, err := programRows(program)
	if err != nil {
		return nil, fmt.Errorf("cannot find %s: %w", program, err)
	}
	return &jail{rows: append(rows, more...), base: b.workDir(), owner: b.uid}, nil
}

func (b *boot) makeLayer(ctx context.Context) (err error) {
	if !b.hasDisks() || b.making != nil {
		return nil
	}
	if _, err := os.Lstat(disk.LayerPath(b.r.cfg.StateDir, b.sandbox.ID)); errors.Is(err, fs.ErrNotExist) {
		b.newLayer = true
	}
	b.layer, _, err = b.r.cfg.Disk.Layer(b.r.cfg.StateDir, b.sandbox.ID, layerOwner, b.sandbox.Resources.DiskBytes)
	if err == nil && b.restore != nil {
		return b.restore.copyDisk(b.layer)
	}
	if err != nil || b.newLayer {
		return err
	}
	return b.repairLayer(ctx)
}

// voice makes one of the VM's voices.
func (b *boot) voice(source *console.Source) (*voice, error) {
	return newVoice(source, b.r.cfg.Logger)
}

// startProcesses starts the helper, then QEMU, and writes down that they run.
func (b *boot) startProcesses(token bootToken, ends transportFiles) (_ *instance, err error) {
	if spec.Joins(b.sandbox.Network) {
		if b.card, err = newNetworkCard(); err != nil {
			return nil, err
		}
		b.files = append(b.files, b.card.tap)
		fault.At("vm start", "network card")
	}
	i := &instance{r: b.r, rec: b.rec, netns: b.card.netns, group: b.group, dir: b.dir, transport: b.transport, logger: b.r.cfg.Logger, layer: b.layer, voices: b.voices}
	defer func() {
		if err != nil {
			i.dropNetNS()
			err = errors.Join(err, b.killStarted(i))
		}
	}()
	run := func(name string, c command, out, errors *voice) (process, error) {
		c.out, c.err, c.uid = out.child, errors.child, b.uid
		p, pidfd, err := c.start(b.group)
		if err == nil {
			i.processes = append(i.processes, member{name, pidfd})
		}
		return p, err
	}
	if ends.Helper != nil {
		helper, err := b.helper(ends.Helper)
		if err != nil {
			return nil, err
		}
		if b.voices.helper, err = b.voice(b.voices.log.Source(helperPrefix, nil)); err != nil {
			return nil, err
		}
		if i.rec.Helper, err = run(memberHelper, helper, b.voices.helper, b.voices.helper); err != nil {
			return nil, err
		}
	}
	fault.At("vm start", "helper runs")
	qemu, err := b.qemu(token, ends.QEMU)
	if err != nil {
		return nil, err
	}
	if b.voices.guest, err = b.voice(b.voices.log.Source("", b.voices.kernel.note)); err != nil {
		return nil, err
	}
	if b.voices.qemu, err = b.voice(b.voices.log.Source(qemuPrefix, nil).Ignoring(waitingForMonitor)); err != nil {
		return nil, err
	}
	if i.rec.QEMU, err = run(memberQEMU, qemu, b.voices.guest, b.voices.qemu); err != nil {
		return nil, err
	}
	fault.At("vm start", "QEMU runs")
	if b.boots() {
		b.initrd, _ = b.keep(qemu.jail.initrd, nil)
	}
	b.voices.all((*voice).started)
	if qemu.jail.descriptors {
		if err := showDescriptors(i.rec.QEMU, i.qemu()); err != nil {
			return nil, err
		}
	}
	if b.making != nil {
		if err := lowerPriority(i.rec.QEMU); err != nil {
			return nil, err
		}
	}
	if err := i.rec.save(b.dir); err != nil {
		return nil, err
	}
	fault.At("vm start", "processes recorded")
	b.r.watch(i)
	return i, nil
}

// killStarted ends and reaps the processes of a VM that nobody watches yet.
func (b *boot) killStarted(i *instance) error {
	err := b.group.Kill()
	for _, p := range i.processes {
		if werr := p.pidfd.SetReadDeadline(time.Now().Add(undoTimeout)); werr != nil {
			err = errors.Join(err, werr)
		}
		_, werr := waitExit(p.pidfd)
		err = errors.Join(err, werr, p.pidfd.Close())
	}
	return err
}

// helper is the vsock helper's command.
func (b *boot) helper(files []*os.File) (command, error) {
	path, err := exec.LookPath(b.r.cfg.VsockHelper)
	if err == nil {
		path, err = filepath.Abs(path)
	}
	if err != nil {
		return command{}, fmt.Errorf("cannot find the vsock helper: %w; install sandbox-vsock beside sandboxd", err)
	}
	// It is static: it needs nothing but itself.
	rows := []jailed{{from: path, at: helperPath, reason: "the program"}}
	t := b.rec.Transport
	return command{
		path: helperPath, files: files, args: []string{"--cid", fmt.Sprint(t.CID), "--port", fmt.Sprint(t.Port)},
		jail: &jail{rows: rows, base: b.workDir(), owner: b.uid},
	}, nil
}

// qemu is QEMU's command: its files and, from their numbers, its arguments.
func (b *boot) qemu(token bootToken, vsock *os.File) (command, error) {
	path, err := b.r.qemuPath()
	if err != nil {
		return command{}, err
	}
	c := command{path: path}
	var errs error
	// add passes a file on and answers with the number QEMU has it under.
	add := func(f *os.File, err error) int {
		errs = errors.Join(errs, err)
		c.files = append(c.files, f)
		return 2 + len(c.files)
	}
	a := vmArgs{
		ID: b.sandbox.ID, Accelerator: b.accel,
		CPUs:        b.rec.CPUs,
		MemoryBytes: b.rec.MemoryBytes,
		Firmware:    firmware(path),
		Kernel:      kernelPath, Initrd: initrdPath,
		Transport: b.rec.Transport.Name, CID: b.rec.Transport.CID,
		Verbose: b.r.cfg.GuestConsole,
	}
	if b.accel == accelTCG {
		a.TSCKHz = b.r.tsc.kHz()
	} else {
		c.groups, errs = kvmGroups()
	}
	a.Vsock = add(vsock, nil)
	a.QMP = add(b.keep(listenUnix(b.dir, qmpSocket)))
	if c.jail, err = b.jail(path, firmwareRows(path)...); err != nil {
		return command{}, err
	}
	if b.accel == accelKVM {
		c.jail.rows = append(c.jail.rows, jailed{from: "/dev/kvm", at: "/dev/kvm", device: true, writable: true, reason: "QEMU takes no descriptor of it"})
	}
	a.Incoming = b.restore != nil
	if b.boots() {
		var ierr error
		c.jail.rows = append(c.jail.rows, jailed{from: b.guest.vmlinuxPath, at: kernelPath, reason: "what it boots"})
		c.jail.initrd, ierr = b.keep(b.guest.initramfs(b.guest.vmBoot(token, b.rec.Transport, b.card.tap != nil), b.uid))
		errs = errors.Join(errs, ierr)
	}
	if b.hasDisks() {
		a.Image = add(b.keep(openImage(b.sandbox.ImagePath)))
		if a.BlankDisk = b.making != nil; !a.BlankDisk {
			a.DirectDisk = b.rec.DirectDisk
			a.Disk = add(b.keep(os.OpenFile(b.layer, os.O_RDWR|unix.O_NOFOLLOW, 0)))
		}
	}
	if b.card.tap != nil {
		a.Tap = add(b.card.tap, nil)
	}
	b.templateFiles(&a, c.jail, add)
	c.args = a.argv()
	return c, errs
}

// openImage opens an image so that nothing can be written through the descriptor, ever.
func openImage(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the image: %w", err)
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot open the image: %w", err), f.Close())
	}
	return f, nil
}

// awaitAgent returns once the guest's agent has proved its boot. The connection is kept for the first Dial.
// explain says why a guest did not come up: how it ended, or what state it is in.
// state asks QEMU for its run state.
// monitor connects to QEMU's monitor, which serves one at a time.
