package workload

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// fakeNetworks has one network, lan. What is joined lies in a directory, as leases lie on a host.
type fakeNetworks struct {
	dir string

	mu        sync.Mutex
	attach    error // what Attach answers
	detach    error
	detachers int
}

func (f *fakeNetworks) Check(name string) error {
	if name != "lan" {
		return spec.Invalidf("spec.network", "no network %q: choose one of none, lan", name)
	}
	return nil
}

func (f *fakeNetworks) Attach(_ context.Context, id, name string, netns *os.File) (spec.Network, error) {
	if _, err := netns.Stat(); err != nil {
		return spec.Network{}, err
	}
	if err := os.MkdirAll(f.dir, 0o700); err != nil {
		return spec.Network{}, err
	}
	if err := os.WriteFile(filepath.Join(f.dir, id), nil, 0o600); err != nil {
		return spec.Network{}, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.attach != nil {
		return spec.Network{}, f.attach
	}
	return spec.Network{Name: name, Interface: "eth0", Addresses: []netip.Prefix{netip.MustParsePrefix("10.0.0.2/24")}}, nil
}

func (f *fakeNetworks) Detach(_ context.Context, id string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.detachers++
	if f.detach != nil {
		return f.detach
	}
	err := os.Remove(filepath.Join(f.dir, id))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

func (f *fakeNetworks) List() ([]string, error) {
	entries, err := os.ReadDir(f.dir)
	var ids []string
	for _, e := range entries {
		ids = append(ids, e.Name())
	}
	if errors.Is(err, os.ErrNotExist) {
		err = nil
	}
	return ids, err
}

func (f *fakeNetworks) fail(attach, detach error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.attach, f.detach = attach, detach
}

func (f *fakeNetworks) want(t *testing.T, ids ...string) {
	t.Helper()
	got, err := f.List()
	if err != nil || !slices.Equal(got, ids) {
		t.Errorf("joined: %q, %v; want %q", got, err, ids)
	}
}

// networkedRuntime gives the fake's instances a network namespace: any file will do.
type networkedRuntime struct{ runtime.Runtime }

type networkedInstance struct{ runtime.Instance }

func (r networkedRuntime) Start(ctx context.Context, s spec.Sandbox) (runtime.Instance, error) {
	i, err := r.Runtime.Start(ctx, s)
	if err != nil {
		return nil, err
	}
	return networkedInstance{i}, nil
}

func (networkedInstance) NetNS() (*os.File, error)   { return os.Open("/proc/self/ns/net") }
func (networkedInstance) Connect(spec.Network) error { return nil }

func networkedHost(t *testing.T) *host {
	h := newHost(t)
	h.rt.Runtime = networkedRuntime{h.rt.Runtime}
	return h
}

func (h *host) createOn(m *Manager, network, script string) (Workload, error) {
	return m.Create(h.ctx(), CreateOptions{Spec: spec.Workload{
		Image: "busybox", Isolation: spec.IsolationContainer, Network: network,
		Process: spec.Process{Command: []string{"/bin/sh", "-c", script}, Stdin: true},
	}})
}

func (h *host) must(err error) {
	h.t.Helper()
	if err != nil {
		h.t.Fatal(err)
	}
}

// A workload is joined while its sandbox is there: at each start anew, and no longer.
func TestNetworkIsHeldWhileTheSandboxIs(t *testing.T) {
	h := networkedHost(t)
	m := h.boot()
	w, err := h.createOn(m, "lan", "read line")
	h.must(err)
	for range 2 {
		h.networks.want(t)
		started, err := m.Start(h.ctx(), w.ID)
		h.must(err)
		if n := started.Status.Networks; len(n) != 1 || n[0].Name != "lan" || len(n[0].Addresses) != 1 {
			t.Errorf("status of a joined workload: %+v", n)
		}
		h.networks.want(t, w.ID)
		h.must(m.Kill(h.ctx(), w.ID, "KILL"))
		if n := h.wait(m, w.ID).Status.Networks; n != nil {
			t.Errorf("status of an ended workload: %+v", n)
		}
	}
	h.networks.want(t)
}

func TestNetworkIsLeftWhateverFails(t *testing.T) {
	h := networkedHost(t)
	m := h.boot()
	if _, err := h.createOn(m, "wan", "true"); spec.KindOf(err) != spec.KindInvalid || !strings.Contains(err.Error(), "lan") {
		t.Errorf("creating with an unknown network: %v", err)
	}
	w, err := h.createOn(m, "lan", "read line")
	h.must(err)

	h.networks.fail(errors.New("no address is free"), nil)
	if _, err := m.Start(h.ctx(), w.ID); err == nil || !strings.Contains(err.Error(), "no address is free") {
		t.Errorf("start: %v", err)
	}
	if got := h.wait(m, w.ID).Status; got.State != StateFailed || !strings.Contains(got.Message, "no address is free") {
		t.Errorf("after a failed ADD: %+v", got)
	}
	h.networks.want(t)

	// One that cannot be left is not forgotten: the removal fails, and can be asked for again.
	h.networks.fail(nil, nil)
	_, err = m.Start(h.ctx(), w.ID)
	h.must(err)
	h.networks.fail(nil, errors.New("the plugin is gone"))
	if err := m.Delete(h.ctx(), w.ID, true); err == nil || !strings.Contains(err.Error(), "the plugin is gone") {
		t.Errorf("delete: %v", err)
	}
	h.networks.want(t, w.ID)
	h.networks.fail(nil, nil)
	h.must(m.Delete(h.ctx(), w.ID, true))
	h.networks.want(t)
}

// A daemon that comes back keeps what a running workload is joined to and takes back the rest.
func TestRecoverLeavesNetworks(t *testing.T) {
	h := networkedHost(t)
	m := h.boot()
	kept, err := h.createOn(m, "lan", "read line")
	h.must(err)
	_, err = m.Start(h.ctx(), kept.ID)
	h.must(err)
	ended, err := h.createOn(m, "lan", "true")
	h.must(err)
	h.must(m.Close())
	for _, left := range []string{ended.ID, strings.Repeat("f", 32)} { // as if the daemon had died half-way
		h.must(os.WriteFile(filepath.Join(h.networks.dir, left), nil, 0o600))
	}
	m = h.boot()
	h.networks.want(t, kept.ID)
	got, err := m.Get(kept.ID)
	h.must(err)
	if len(got.Status.Networks) != 1 {
		t.Errorf("a workload that went on: %+v", got.Status)
	}
	h.must(m.Delete(h.ctx(), kept.ID, true))
	h.networks.want(t)
}

func TestNetworkNeedsANamespace(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	w, err := h.createOn(m, "lan", "true")
	h.must(err)
	if _, err := m.Start(h.ctx(), w.ID); spec.KindOf(err) != spec.KindUnsupported {
		t.Errorf("start behind a wall without a network: %v", err)
	}
	h.networks.want(t)
}
