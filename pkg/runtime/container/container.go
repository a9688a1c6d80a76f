package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/idrange"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// name is what this runtime calls itself in directories and marks.
	name = "container"
	// destroyTimeout bounds tearing one sandbox down; most of it is for the last writes to reach the disk.
	destroyTimeout = 30 * time.Second
	// minMemory is what the agent needs to serve at all.
	minMemory = 16 << 20
	// agentPids is how many threads the agent may have, a Go program that ends when it is refused one. The workload, in a
	// group of its own within the sandbox's, cannot take them.
	agentPids = 48
	// onTheWayIn is how many threads there may be in that group on top of the processes the workload may have: the agent's own that
	// forks there, a copy, which is a Go program, and a child until it is the workload. A guest's group allows for as many.
	onTheWayIn = 16
	// firstInherited is the first descriptor after standard error.
	firstInherited = 3
)

// Config is what a Runtime works with. Every field but Logger must be set.
type Config struct {
	// Directories; made if missing.
	RunDir, StateDir string
	// The cgroup below which each sandbox gets its own, in every hierarchy: /sandboxd.
	CgroupParent string
	// Path of the sandbox-agent binary.
	Agent  string
	Disk   *disk.Maker
	IDs    *idrange.Allocator
	Logger *zap.Logger
	// How many agents wait for a sandbox, made ahead of time; 0 for none. See pool.
	Pool Pool
}

// Runtime builds sandboxes of namespaces. Close it when the daemon ends; its sandboxes go on.
type Runtime struct {
	config Config
	log    *zap.Logger
	mounts *mounter
	agent  *agentBinary
	// What it has loaded.
	appArmor *appArmor
	// Forks the agents.
	spawner *spawner
	layers  *layers
	// Sandboxes made ahead of time.
	pool *pool
	// Of every instance, until it has given back what it held.
	watches sync.WaitGroup

	mu        sync.Mutex
	instances map[string]*instance // those this daemon started or attached to, until they are removed
	hidden    map[string]bool      // what Probe is making right now and what waits in the pool: List does not name it
}

var (
	_ runtime.Runtime = (*Runtime)(nil)
	_ runtime.Prober  = (*Runtime)(nil)
)

// New makes a Runtime. It touches nothing on the host but its own directory.
func New(c Config) (*Runtime, error) {
	for field, missing := range map[string]bool{
		"RunDir": c.RunDir == "", "StateDir": c.StateDir == "", "CgroupParent": c.CgroupParent == "", "Agent": c.Agent == "", "Disk": c.Disk == nil, "IDs": c.IDs == nil,
	} {
		if missing {
			return nil, fmt.Errorf("cannot make a container runtime: %s is not set", field)
		}
	}
	if err := cgroup.CheckParent(c.CgroupParent); err != nil {
		return nil, fmt.Errorf("cannot make a container runtime: %w", err)
	}
	if c.Logger == nil {
		c.Logger = zap.NewNop()
	}
	for _, dir := range []*string{&c.RunDir, &c.StateDir} {
		abs, err := filepath.Abs(*dir)
		if err != nil {
			return nil, fmt.Errorf("cannot make a container runtime: %w", err)
		}
		*dir = abs
	}
	r := &Runtime{
		config: c, log: c.Logger.Named(name),
		mounts: &mounter{log: c.Logger}, agent: &agentBinary{path: c.Agent}, spawner: &spawner{}, appArmor: &appArmor{},
		instances: map[string]*instance{}, hidden: map[string]bool{},
	}
	r.layers = newLayers(r)
	if err := r.layers.clear(); err != nil {
		return nil, fmt.Errorf("cannot make a container runtime: %w", err)
	}
	// What this process was started with (a shell's or systemd's descriptors) is not for sandboxes; all that Go opens is
	// marked already.
	if err := unix.CloseRange(firstInherited, math.MaxInt32, unix.CLOSE_RANGE_CLOEXEC); err != nil {
		return nil, fmt.Errorf("cannot keep descriptors from sandboxes: %w", err)
	}
	if err := ownDir(r.dir("")); err != nil {
		return nil, fmt.Errorf("cannot make a container runtime: %w", err)
	}
	var err error
	if r.pool, err = newPool(r, c.Pool); err != nil {
		return nil, fmt.Errorf("cannot make a container runtime: %w", err)
	}
	return r, nil
}

// Close gives back what the daemon itself holds. Sandboxes go on; instances handed out no longer report their end.
func (r *Runtime) Close() error {
	poolErr := r.pool.close()
	r.mu.Lock()
	instances := slices.Collect(maps.Values(r.instances))
	clear(r.instances)
	r.mu.Unlock()
	for _, i := range instances {
		i.forget()
	}
	r.watches.Wait()
	r.layers.close()
	r.spawner.close()
	return errors.Join(poolErr, r.mounts.close(), r.agent.close())
}

func (r *Runtime) dir(id string) string { return filepath.Join(r.config.RunDir, name, id) }

// idPattern is what an id of a sandbox must be; it becomes part of paths and of mount options.
var idPattern = regexp.MustCompile(`^[0-9a-f]{32}$`)

func validID(id string) error {
	if !idPattern.MatchString(id) {
		return spec.Invalidf("id", "%q is no sandbox id: it has 32 hexadecimal digits", id)
	}
	return nil
}

func validate(s spec.Sandbox) error {
	if err := validID(s.ID); err != nil {
		return err
	}
	switch {
	case !filepath.IsAbs(s.ImagePath):
		return spec.Invalidf("image_path", "image path %q is not absolute", s.ImagePath)
	case s.Resources.CPUMillis == 0:
		return spec.Invalidf("spec.resources.cpu_millis", "a sandbox needs a processor limit")
	case s.Resources.MemoryBytes < minMemory:
		return spec.Invalidf("spec.resources.memory_bytes", "a sandbox needs at least %d bytes of memory", uint64(minMemory))
	case s.Resources.Pids == 0:
		return spec.Invalidf("spec.resources.pids", "a sandbox needs a process limit")
	case s.Resources.DiskBytes < disk.MinSize:
		return spec.Invalidf("spec.resources.disk_bytes", "a sandbox needs a writable layer of at least %d bytes", uint64(disk.MinSize))
	}
	return nil
}

// Attach finds a sandbox that an earlier daemon, or an earlier call, started.
func (r *Runtime) Attach(_ context.Context, id string) (runtime.Instance, error) {
	if err := validID(id); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if i, ok := r.instances[id]; ok {
		if i.running() {
			return i, nil
		}
		return nil, runtime.ErrNotRunning
	}
	rec, err := readRecord(r.dir(id))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, runtime.ErrNotRunning
	}
	if err != nil {
		return nil, fmt.Errorf("cannot attach to sandbox %s: %w", id, err)
	}
	if !rec.Ready {
		return nil, runtime.ErrNotRunning // the daemon died while it made it
	}
	pidfd, err := openProcess(rec.PID, rec.StartTime)
	if errors.Is(err, errProcessGone) {
		return nil, runtime.ErrNotRunning
	}
	if err != nil {
		return nil, fmt.Errorf("cannot attach to sandbox %s: %w", id, err)
	}
	group, err := cgroup.Load(rec.CgroupParent, rec.MadeAs)
	if err != nil {
		_ = pidfd.Close() // nothing was done with it
		return nil, fmt.Errorf("cannot attach to sandbox %s: %w", id, err)
	}
	i := r.newInstance(rec, pidfd, group, held{}, make(chan struct{}))
	r.instances[id] = i
	return i, nil
}

// Remove deletes everything of a sandbox.
func (r *Runtime) Remove(ctx context.Context, id string) error {
	if err := validID(id); err != nil {
		return err
	}
	return r.destroy(ctx, id, true)
}

// Release deletes everything of a sandbox but its writable layer.
func (r *Runtime) Release(ctx context.Context, id string) error {
	if err := validID(id); err != nil {
		return err
	}
	return r.destroy(ctx, id, false)
}

// List names the sandboxes with a run directory or a writable layer: Remove deletes these two last.
func (r *Runtime) List(context.Context) ([]string, error) {
	entries, err := os.ReadDir(r.dir(""))
	if err != nil {
		return nil, fmt.Errorf("cannot list sandboxes: %w", err)
	}
	ids, err := disk.Layers(r.config.StateDir, name)
	if err != nil {
		return nil, fmt.Errorf("cannot list sandboxes: %w", err)
	}
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	ids = slices.DeleteFunc(ids, func(id string) bool { return validID(id) != nil || r.hidden[id] })
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// destroy is the one way a sandbox ends: after Remove and Release, after a Start that failed, and after a daemon that
// died. Each step works whether or not the thing exists; the record goes last, so that a destroy that failed is found.
func (r *Runtime) destroy(ctx context.Context, id string, layer bool) error {
	defer r.pool.note()
	// A teardown that began is finished, whoever stops waiting for it.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), destroyTimeout)
	defer cancel()
	fault.At("container end", "begun")
	verb := "release: "
	if layer {
		verb = "remove: "
	}
	parent, madeAs := r.config.CgroupParent, id
	rec, err := readRecord(r.dir(id))
	switch {
	case err == nil:
		parent, madeAs = rec.CgroupParent, rec.MadeAs
	case !errors.Is(err, fs.ErrNotExist):
		// Half a record cannot be: it is written whole. Go on with what the configuration says.
		r.log.Warn("cannot read a sandbox's record", zap.String("sandbox", id), zap.Error(err))
	}
	err = timed(id, verb+"processes and cgroup", func() error { return r.end(ctx, verb, parent, id, madeAs) })
	if err != nil {
		return fmt.Errorf("cannot remove sandbox %s: %w", id, err)
	}
	fault.At("container end", "processes and cgroup")
	err = timed(id, verb+"layer", func() error { return r.layers.ended(ctx, id) })
	if err != nil {
		return fmt.Errorf("cannot remove sandbox %s: %w", id, err)
	}
	fault.At("container end", "layer")
	if err := timed(id, verb+"ids", func() error { return r.config.IDs.Release(madeAs) }); err != nil {
		return fmt.Errorf("cannot remove sandbox %s: %w", id, err)
	}
	fault.At("container end", "ids")
	if layer {
		err := timed(id, verb+"layer deleted", func() error { return r.layers.remove(id) })
		if err != nil {
			return fmt.Errorf("cannot remove sandbox %s: %w", id, err)
		}
	}
	fault.At("container end", "layer deleted")
	if err := r.removeUnnamed(ctx, id, madeAs); err != nil {
		return fmt.Errorf("cannot remove sandbox %s: %w", id, err)
	}
	if err := timed(id, verb+"record", func() error { return os.RemoveAll(r.dir(id)) }); err != nil {
		return fmt.Errorf("cannot remove sandbox %s: %w", id, err)
	}
	fault.At("container end", "record")
	return nil
}

// removeUnnamed removes a layer that did not get its sandbox's id, because the daemon died, or failed, just then.
func (r *Runtime) removeUnnamed(ctx context.Context, id, madeAs string) error {
	if madeAs == id {
		return nil
	}
	if _, err := os.Lstat(layerDir(r.config.StateDir, madeAs)); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err := r.layers.ended(ctx, madeAs); err != nil {
		return err
	}
	return r.layers.remove(madeAs)
}

func timed(id, name string, fn func() error) error {
	defer phase.Begin(id, name)()
	return fn()
}

// end kills every process of a sandbox, waits until they are gone and deletes its cgroup.
func (r *Runtime) end(ctx context.Context, verb, parent, id, madeAs string) error {
	group, err := cgroup.Load(parent, madeAs)
	if err != nil && spec.KindOf(err) != spec.KindNotFound {
		return err
	}
	if err == nil {
		if err := group.Kill(); err != nil {
			return err
		}
		fault.At("container end", "killed")
	}
	// The end of PID 1 is an event to wait for; the end of a process that has no instance is polled for by Delete. The
	// instance is known until then, so that the next try has it too.
	i := r.instance(id)
	if i != nil {
		if err := timed(id, verb+"processes end", func() error { return waitClosed(ctx, i.done) }); err != nil {
			return err
		}
		fault.At("container end", "ended")
	}
	if group != nil {
		if err := timed(id, verb+"cgroup", func() error { return group.Delete(ctx) }); err != nil {
			return err
		}
	}
	if i != nil {
		waitReaped(ctx, i.pidfd) // by the spawner, meanwhile
		fault.At("container end", "reaped")
		r.forget(id)
	}
	return nil
}

func (r *Runtime) instance(id string) *instance {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.instances[id]
}

func (r *Runtime) forget(id string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.instances, id)
}
