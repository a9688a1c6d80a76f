package microvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/idrange"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Policies for Config.Accel.
const (
	// AccelKVM starts nothing where KVM has not been seen to run a guest.
	AccelKVM = "kvm"
	// AccelAuto takes software emulation where KVM does not work. QEMU gives no security promise for that.
	AccelAuto = "auto"
	// AccelTCG is software emulation always.
	AccelTCG = "tcg"
)

// layerOwner is under which name writable layers are this runtime's.
const layerOwner = "microvm"

// Config is what a Runtime needs. Every field is required unless it says otherwise.
type Config struct {
	// Directories of the daemon: the runtime keeps to RunDir/microvm, StateDir/microvm and StateDir/sandbox.
	RunDir   string
	StateDir string
	// Sandboxes' cgroups are made below it.
	CgroupParent string
	// The sandbox-agent binary.
	Agent string
	// A vmlinuz; empty for the host's newest suitable one.
	Kernel string
	// AccelKVM, AccelAuto or AccelTCG.
	Accel string
	// How long the guest that tries KVM out may take; 0 for ten seconds. A host that is emulated itself needs more.
	KVMTrial time.Duration
	// QEMU; empty to find it in PATH.
	QEMU string
	// The sandbox-vsock binary; needed where the host has no /dev/vhost-vsock.
	VsockHelper string
	// Optional: guest kernels say on their console everything they do, which costs a start about 150 ms; else what goes
	// wrong.
	GuestConsole bool
	// Optional: VMs are cloned from templates.
	Templates TemplateConfig
	Logger    *zap.Logger
	Disk      *disk.Maker
	IDs       *idrange.Allocator
}

// Runtime builds microVMs.
type Runtime struct {
	cfg Config
	tsc tscSample

	// hub is nil where the host has no usable kernel vsock; hubErr then says why.
	hub    *kernelHub
	hubErr error

	// Lock order: kvmMu, guestMu, mu.
	guestMu sync.Mutex
	guestOf *guest // guarded by guestMu

	kvmMu   sync.Mutex
	kvmSeen *kvmVerdict // guarded by kvmMu

	// Nil where there are none.
	templates *templateStore
	// Clones that wait; of size 0 without templates.
	pool *pool
	// Whatever makes templates; Close waits for it first.
	makers sync.WaitGroup
	// Done when the runtime is closed; what makes templates ends with it.
	life context.Context
	quit context.CancelFunc

	mu        sync.Mutex
	instances map[string]*instance // guarded by mu

	// Goroutines that watch processes; Close waits for them.
	owned sync.WaitGroup
}

var (
	_ runtime.Runtime = (*Runtime)(nil)
	_ runtime.Prober  = (*Runtime)(nil)
)

// New makes a Runtime. It starts nothing and waits for nothing; what the host lacks is Probe's to say.
func New(cfg Config) (*Runtime, error) {
	switch cfg.Accel {
	case AccelKVM, AccelAuto, AccelTCG:
	default:
		return nil, spec.Errorf(spec.KindInvalid, "accelerator %q is not known: choose kvm, auto or tcg", cfg.Accel)
	}
	for _, dir := range []string{filepath.Join(cfg.RunDir, "microvm"), filepath.Join(cfg.StateDir, "microvm")} {
		if err := makePrivateDir(dir); err != nil {
			return nil, err
		}
	}
	// The state directory is one daemon's. What is in a run directory goes with its VM.
	if err := removeUnfinished(filepath.Join(cfg.StateDir, "microvm")); err != nil {
		return nil, err
	}
	r := &Runtime{cfg: cfg, tsc: sampleTSC(), instances: map[string]*instance{}}
	r.life, r.quit = context.WithCancel(context.Background())
	var err error
	if r.pool, err = newPool(r, cfg.Templates.Pool); err != nil {
		return nil, err
	}
	if !cfg.Templates.On {
		r.pool.c.Size = 0
	} else {
		if r.templates, err = openTemplates(filepath.Join(cfg.StateDir, "microvm", templatesDir), cfg.Templates, cfg.Logger); err != nil {
			return nil, err
		}
		r.templates.dropped = r.pool.dropped
	}
	r.hub, r.hubErr = newKernelHub(filepath.Join(cfg.StateDir, "microvm"), cfg.Logger)
	return r, nil
}

// Close stops watching. Every VM keeps running, for the next daemon to Attach to. Instances of r must not be used any more.
func (r *Runtime) Close() error {
	r.quit()
	// Who makes a template removes its guest, which nobody must have let go of before.
	r.makers.Wait()
	r.pool.close()
	r.mu.Lock()
	for _, i := range r.instances {
		i.abandon()
	}
	clear(r.instances)
	r.mu.Unlock()
	r.owned.Wait()
	if r.templates != nil {
		r.templates.close()
	}
	if r.hub == nil {
		return nil
	}
	return r.hub.Close()
}

// makePrivateDir makes dir root's own. Something else of that name that was there before is refused: a link would lead
// what is written below it elsewhere.
func makePrivateDir(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return fmt.Errorf("cannot make %s: %w", dir, err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("cannot make %s: %w", dir, err)
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return fmt.Errorf("cannot make %s: %w", dir, err)
	}
	if !info.IsDir() || info.Mode().Perm() != 0o700 {
		return fmt.Errorf("cannot use %s: it must be a directory of mode 0700, and is %v", dir, info.Mode())
	}
	return nil
}

// idPattern is what a sandbox's id looks like; it becomes part of paths.
var idPattern = regexp.MustCompile(`^[0-9a-f]{32}$`)

func checkID(id string) error {
	if !idPattern.MatchString(id) {
		return spec.Errorf(spec.KindInvalid, "%q is not the id of a sandbox", id)
	}
	return nil
}

// dir is a VM's own run directory.
func (r *Runtime) dir(id string) string { return filepath.Join(r.cfg.RunDir, "microvm", id) }

// guest makes what VMs boot, the first time.
func (r *Runtime) guest() (*guest, error) {
	r.guestMu.Lock()
	defer r.guestMu.Unlock()
	if r.guestOf != nil {
		return r.guestOf, nil
	}
	g, err := prepareGuest(filepath.Join(r.cfg.StateDir, "microvm"), r.cfg.Kernel, r.cfg.Agent)
	if err == nil {
		r.guestOf = g
	}
	return g, err
}

// List implements runtime.Runtime.
func (r *Runtime) List(context.Context) ([]string, error) {
	seen := map[string]bool{}
	entries, err := os.ReadDir(filepath.Join(r.cfg.RunDir, "microvm"))
	if err != nil {
		return nil, fmt.Errorf("cannot list microVMs: %w", err)
	}
	for _, e := range entries {
		seen[e.Name()] = true
	}
	layers, err := disk.Layers(r.cfg.StateDir, layerOwner)
	if err != nil {
		return nil, err
	}
	for _, id := range layers {
		seen[id] = true
	}
	var ids []string
	for id := range seen {
		if checkID(id) == nil && !r.pool.hides(id) {
			ids = append(ids, id)
		}
	}
	return ids, nil
}
