package runtimetest

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/pkg/agent/guest"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// FakeTransport is what a fake's Facts say of how its agents are reached.
const FakeTransport = "fake"

// Fake is a runtime WITHOUT WALLS, for tests of what lies above runtimes. It runs the real agent in this process, and what
// that starts are ordinary processes that see the host's files: a test chooses what it runs.
//
// All fakes of one directory are of one host: a second NewFake with the same directory, like a daemon's second life, finds
// what the first started.
type Fake struct {
	host *fakeHost
	// OnStart, if set, is called in Start before anything is made; its error is Start's. It may wait.
	OnStart func(context.Context, spec.Sandbox) error
}

var _ runtime.Runtime = (*Fake)(nil)

// fakeHost is what outlives a daemon.
type fakeHost struct {
	dir string

	mu        sync.Mutex
	sandboxes map[string]*fakeInstance
}

var (
	fakeHostsMu sync.Mutex
	fakeHosts   = map[string]*fakeHost{}
)

// NewFake makes a fake runtime whose files are below dir. When the test ends, every sandbox of dir does.
func NewFake(t testing.TB, dir string) *Fake {
	t.Helper()
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	fakeHostsMu.Lock()
	defer fakeHostsMu.Unlock()
	h := fakeHosts[dir]
	if h == nil {
		h = &fakeHost{dir: dir, sandboxes: map[string]*fakeInstance{}}
		fakeHosts[dir] = h
		t.Cleanup(func() {
			fakeHostsMu.Lock()
			delete(fakeHosts, dir)
			fakeHostsMu.Unlock()
			h.powerOff()
		})
	}
	return &Fake{host: h}
}

// powerOff ends every sandbox and waits for it.
func (h *fakeHost) powerOff() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, i := range h.sandboxes {
		_ = i.Kill()
		<-i.done
	}
}

var fakeID = regexp.MustCompile(`^[0-9a-f]{32}$`)

// layer is the file that stands for a sandbox's writable layer.
func (h *fakeHost) layer(id string) string { return filepath.Join(h.dir, id+".layer") }

// Start implements runtime.Runtime. Like a real one it wants everything decided, and its image there.
func (f *Fake) Start(ctx context.Context, s spec.Sandbox) (runtime.Instance, error) {
	if !fakeID.MatchString(s.ID) {
		return nil, spec.Invalidf("id", "%q is no sandbox id", s.ID)
	}
	if r := s.Resources; r.CPUMillis == 0 || r.MemoryBytes == 0 || r.Pids == 0 || r.DiskBytes == 0 {
		return nil, spec.Invalidf("spec.resources", "resources %+v are not all decided", r)
	}
	if f.OnStart != nil {
		if err := f.OnStart(ctx, s); err != nil {
			return nil, err
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("cannot start sandbox %s: %w", s.ID, err)
	}
	if _, err := os.Stat(s.ImagePath); err != nil {
		return nil, fmt.Errorf("cannot start sandbox %s: %w", s.ID, err)
	}
	return f.host.start(s)
}

func (h *fakeHost) start(s spec.Sandbox) (runtime.Instance, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if i := h.sandboxes[s.ID]; i != nil {
		return nil, spec.Errorf(spec.KindAlreadyExists, "sandbox %s is there already", s.ID)
	}
	if err := os.WriteFile(h.layer(s.ID), nil, 0o600); err != nil {
		return nil, fmt.Errorf("cannot start sandbox %s: %w", s.ID, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	i := &fakeInstance{spec: s, listener: newPairListener(), kill: cancel, done: make(chan struct{}), gate: newGate()}
	go func() { // ends with Kill, which powerOff calls and waits for
		defer close(i.done)
		defer cancel()
		_ = guest.ServePlain(ctx, i.listener)
		_ = i.listener.Close()
	}()
	h.sandboxes[s.ID] = i
	return i, nil
}

// Attach implements runtime.Runtime.
func (f *Fake) Attach(_ context.Context, id string) (runtime.Instance, error) {
	f.host.mu.Lock()
	defer f.host.mu.Unlock()
	i := f.host.sandboxes[id]
	if i == nil || i.ended() {
		return nil, runtime.ErrNotRunning
	}
	return i, nil
}

// Remove implements runtime.Runtime.
func (f *Fake) Remove(ctx context.Context, id string) error {
	if err := f.Release(ctx, id); err != nil {
		return err
	}
	if err := os.Remove(f.host.layer(id)); err != nil && !os.IsNotExist(err) {
		return fmt.Errorf("cannot remove sandbox %s: %w", id, err)
	}
	return nil
}

// Release implements runtime.Runtime.
func (f *Fake) Release(ctx context.Context, id string) error {
	f.host.mu.Lock()
	i := f.host.sandboxes[id]
	f.host.mu.Unlock()
	if i == nil {
		return nil
	}
	_ = i.Kill()
	select {
	case <-i.done:
	case <-ctx.Done():
		return fmt.Errorf("cannot remove sandbox %s: %w", id, ctx.Err())
	}
	f.host.mu.Lock()
	defer f.host.mu.Unlock()
	delete(f.host.sandboxes, id)
	return nil
}

// List implements runtime.Runtime.
func (f *Fake) List(context.Context) ([]string, error) {
	layers, err := filepath.Glob(f.host.layer("*"))
	if err != nil {
		return nil, fmt.Errorf("cannot list sandboxes: %w", err)
	}
	f.host.mu.Lock()
	defer f.host.mu.Unlock()
	ids := slices.Collect(maps.Keys(f.host.sandboxes))
	for _, layer := range layers {
		name := filepath.Base(layer)
		ids = append(ids, name[:len(name)-len(".layer")])
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}

// fakeInstance is a sandbox without walls.
type fakeInstance struct {
	mu       sync.Mutex // guards spec.Resources
	spec     spec.Sandbox
	listener *pairListener
	kill     context.CancelFunc
	done     chan struct{}
	gate     *gate
}

var (
	_ runtime.Instance = (*fakeInstance)(nil)
	_ runtime.Updater  = (*fakeInstance)(nil)
	_ runtime.Pauser   = (*fakeInstance)(nil)
	_ runtime.Adopter  = (*fakeInstance)(nil)
)

func (i *fakeInstance) ended() bool {
	select {
	case <-i.done:
		return true
	default:
		return false
	}
}

func (i *fakeInstance) Dial(ctx context.Context) (net.Conn, error) {
	if i.ended() {
		return nil, runtime.ErrNotRunning
	}
	conn, err := i.listener.dial(ctx)
	if err != nil && ctx.Err() == nil {
		return nil, runtime.ErrNotRunning // it ended meanwhile
	}
	if err != nil {
		return nil, err
	}
	return &gatedConn{Conn: conn, gate: i.gate, closed: make(chan struct{})}, nil
}

func (i *fakeInstance) Kill() error {
	i.kill()
	return nil
}

func (i *fakeInstance) Done() <-chan struct{} { return i.done }

// Usage knows the limits; nothing is counted.
func (i *fakeInstance) Usage() (spec.Usage, error) {
	i.mu.Lock()
	r := i.spec.Resources
	i.mu.Unlock()
	return spec.Usage{Time: time.Now(), MemoryLimitBytes: r.MemoryBytes, PidsLimit: uint64(r.Pids), DiskLimitBytes: r.DiskBytes}, nil
}

// CheckUpdate implements runtime.Updater: like a VM it keeps the memory it was started with.
func (i *fakeInstance) CheckUpdate(now, to spec.Resources) error {
	if now.MemoryBytes != to.MemoryBytes {
		return spec.Errorf(spec.KindWrongState, "a fake keeps its memory")
	}
	return nil
}

// Update implements runtime.Updater. Usage knows the new limits.
func (i *fakeInstance) Update(_ context.Context, to spec.Resources) error {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.spec.Resources = to
	return nil
}

// Pause implements runtime.Pauser: nothing comes from the agent, and nothing gets there. Its processes go on, for they are
// the test's own.
func (i *fakeInstance) Pause(context.Context) error {
	i.gate.shut()
	return nil
}

// Resume implements runtime.Pauser.
func (i *fakeInstance) Resume() error {
	i.gate.open()
	return nil
}

// Adopt implements runtime.Adopter: its processes are the test's own.
func (i *fakeInstance) Adopt(*os.File) error { return nil }

func (i *fakeInstance) Facts() runtime.Facts {
	return runtime.Facts{HostPID: os.Getpid(), AgentTransport: FakeTransport}
}
