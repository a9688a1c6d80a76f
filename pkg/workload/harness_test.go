package workload

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zaptest"

	"github.com/sandboxd/sandboxd/pkg/image"
	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/runtime/runtimetest"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// waitLimit bounds every wait of these tests.
const waitLimit = 30 * time.Second

// host is a state directory and a fake runtime that outlive the managers a test makes on them, as a host outlives its
// daemons.
type host struct {
	t        *testing.T
	dir      string
	rt       *faultyRuntime
	images   fakeImages
	policy   *policy.Policy
	networks *fakeNetworks
}

func newHost(t *testing.T) *host {
	t.Helper()
	dir := t.TempDir()
	path := filepath.Join(dir, "image.erofs")
	if err := os.WriteFile(path, []byte("image"), 0o444); err != nil {
		t.Fatal(err)
	}
	return &host{
		t: t, dir: dir, policy: policy.None(), networks: &fakeNetworks{dir: filepath.Join(dir, "joined")},
		rt: &faultyRuntime{Runtime: runtimetest.NewFake(t, filepath.Join(dir, "host"))},
		images: fakeImages{"busybox": {
			Digest: "sha256:" + strings.Repeat("ab", 32), Names: []string{"busybox"}, Path: path,
			Config: spec.ImageConfig{Command: []string{"/bin/sh"}},
		}},
	}
}

// boot makes a manager, recovered. It is closed when the test ends.
func (h *host) boot() *Manager {
	h.t.Helper()
	m := h.open()
	h.t.Cleanup(func() { _ = m.Close() })
	return m
}

func (h *host) open() *Manager {
	h.t.Helper()
	m, err := New(Config{
		StateDir: filepath.Join(h.dir, "state"),
		Log:      zaptest.NewLogger(h.t, zaptest.Level(zap.WarnLevel)),
		Images:   h.images, Policy: h.policy, Networks: h.networks,
		Runtimes: map[spec.Isolation]runtime.Runtime{spec.IsolationContainer: h.rt},
		Host:     func() policy.Host { return policy.Host{ContainerAvailable: true} },
	})
	if err != nil {
		h.t.Fatal(err)
	}
	if err := m.Recover(h.ctx()); err != nil {
		h.t.Fatal(err)
	}
	return m
}

func (h *host) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), waitLimit)
	h.t.Cleanup(cancel)
	return ctx
}

func (h *host) create(m *Manager, script string) string {
	h.t.Helper()
	w, err := m.Create(h.ctx(), CreateOptions{Spec: spec.Workload{
		Image: "busybox", Isolation: spec.IsolationContainer,
		Process: spec.Process{Command: []string{"/bin/sh", "-c", script}, Stdin: true},
	}})
	if err != nil {
		h.t.Fatal(err)
	}
	return w.ID
}

func (h *host) start(m *Manager, script string) string {
	h.t.Helper()
	id := h.create(m, script)
	if _, err := m.Start(h.ctx(), id); err != nil {
		h.t.Fatal(err)
	}
	return id
}

func (h *host) wait(m *Manager, id string) Workload {
	h.t.Helper()
	w, err := m.Wait(h.ctx(), id)
	if err != nil {
		h.t.Fatal(err)
	}
	return w
}

func (h *host) logs(m *Manager, id string) string {
	h.t.Helper()
	var b strings.Builder
	if err := m.Logs(h.ctx(), id, LogOptions{Tail: -1}, func(e LogEntry) error {
		b.Write(e.Data)
		return nil
	}); err != nil {
		h.t.Fatal(err)
	}
	return b.String()
}

// awaitOutput waits until the workload has written text.
func (h *host) awaitOutput(m *Manager, id, text string) {
	h.t.Helper()
	ctx, cancel := context.WithCancel(h.ctx())
	defer cancel()
	var b strings.Builder
	seen := false
	err := m.Logs(ctx, id, LogOptions{Tail: -1, Follow: true}, func(e LogEntry) error {
		b.Write(e.Data)
		if seen = strings.Contains(b.String(), text); seen {
			cancel()
		}
		return nil
	})
	if !seen {
		h.t.Fatalf("output %q without %q: %v", b.String(), text, err)
	}
}

// sandboxes are the ids of which the host still has something.
func (h *host) sandboxes() []string {
	h.t.Helper()
	ids, err := h.rt.List(h.ctx())
	if err != nil {
		h.t.Fatal(err)
	}
	return ids
}

type fakeImages map[string]image.Image

func (f fakeImages) Get(ref string) (image.Image, error) {
	for name, img := range f {
		if ref == name || ref == img.Digest {
			return img, nil
		}
	}
	return image.Image{}, spec.Errorf(spec.KindNotFound, "no image %q", ref)
}

// faultyRuntime fails where a test says so.
type faultyRuntime struct {
	runtime.Runtime
	// Called before Start; its error is Start's.
	beforeStart func(ctx context.Context) error
	// Dial fails with it.
	dialError error
	// Release of these fails.
	releaseError map[string]error

	mu          sync.Mutex // guards what follows
	attachError error
	// So many calls of Remove fail.
	removeFails int
}

func (f *faultyRuntime) failRemoves(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.removeFails = n
}

func (f *faultyRuntime) Remove(ctx context.Context, id string) error {
	f.mu.Lock()
	fails := f.removeFails > 0
	if fails {
		f.removeFails--
	}
	f.mu.Unlock()
	if fails {
		return errors.New("device busy")
	}
	return f.Runtime.Remove(ctx, id)
}

func (f *faultyRuntime) setAttachError(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.attachError = err
}

func (f *faultyRuntime) Attach(ctx context.Context, id string) (runtime.Instance, error) {
	f.mu.Lock()
	err := f.attachError
	f.mu.Unlock()
	if err != nil {
		return nil, err
	}
	return f.Runtime.Attach(ctx, id)
}

func (f *faultyRuntime) Release(ctx context.Context, id string) error {
	if err := f.releaseError[id]; err != nil {
		return err
	}
	return f.Runtime.Release(ctx, id)
}

func (f *faultyRuntime) Start(ctx context.Context, s spec.Sandbox) (runtime.Instance, error) {
	if f.beforeStart != nil {
		if err := f.beforeStart(ctx); err != nil {
			return nil, err
		}
	}
	inst, err := f.Runtime.Start(ctx, s)
	if err != nil || f.dialError == nil {
		return inst, err
	}
	return undialable{inst, f.dialError}, nil
}

type undialable struct {
	runtime.Instance
	err error
}

func (u undialable) Dial(context.Context) (net.Conn, error) { return nil, u.err }
