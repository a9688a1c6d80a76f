package microvm

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// drawn are what a VM and what goes on from it draw, by busybox scripts: by a file of the kernel's, a device and getrandom(2).
var drawn = []string{"cat /proc/sys/kernel/random/uuid", "/bin/busybox head -c 1048576 /dev/urandom | /bin/busybox sha256sum", "/bin/busybox mktemp -u"}

// take takes a snapshot of v.
func take(t *testing.T, v *vm) string {
	t.Helper()
	dir := t.TempDir()
	if _, err := v.Instance.(runtime.Snapshotter).Snapshot(testContext(t), dir, runtime.SnapshotHooks{
		Freeze:  func(ctx context.Context) error { return v.client.Freeze(ctx, true) },
		Stopped: func() error { return nil },
		Thaw:    func(ctx context.Context) error { return v.client.Freeze(ctx, false) },
	}); err != nil {
		t.Fatal(err)
	}
	return dir
}

// restore starts a VM from what take made, and lets its processes go on.
func (b *bench) restoreFrom(t *testing.T, r *Runtime, from *vm, dir string) *vm {
	t.Helper()
	s := b.sandbox()
	i, err := r.Restore(testContext(t), s, dir)
	if err != nil {
		t.Fatal(err)
	}
	v := &vm{Sandbox: s, Instance: i, client: agent.New(i.Dial, i.Done()), container: from.ID}
	t.Cleanup(func() { v.client.Close(); b.remove(t, r, s.ID) })
	if _, err := v.client.Rename(testContext(t), s.ID[:12], s.ID); err != nil {
		t.Fatal(err)
	}
	if err := v.client.Freeze(testContext(t), false); err != nil {
		t.Fatal(err)
	}
	return v
}

// TestSnapshotGoesOn: what goes on from a snapshot has what its guest had, another identity, and is found by the next daemon.
func TestSnapshotGoesOn(t *testing.T) {
	b := newBench(t)
	r := b.runtime(t)
	s := b.sandbox()
	s.Snapshots = true
	v := b.startSandbox(t, r, s)
	v.sh(t, "echo kept >/kept")
	dir := take(t, v)
	v.sh(t, "echo later >/kept")
	seen := map[string]bool{}
	for _, d := range drawn {
		seen[v.sh(t, d)] = true
	}
	var last *vm
	for range 2 {
		w := b.restoreFrom(t, r, v, dir)
		if f := w.Facts(); f.StartedFrom != startedSnapshot {
			t.Errorf("started from %q", f.StartedFrom)
		}
		if got := w.sh(t, "cat /kept"); got != "kept" {
			t.Errorf("its disk says %q", got)
		}
		if got := w.sh(t, "/bin/busybox hostname"); got != w.ID[:12] {
			t.Errorf("its name is %q", got)
		}
		for _, d := range drawn {
			got := w.sh(t, d)
			if seen[got] {
				t.Errorf("%s drew %q again", d, got)
			}
			seen[got] = true
		}
		checkClock(t, w)
		last = w
	}
	if got := v.sh(t, "cat /kept"); got != "later" {
		t.Errorf("the parent's disk says %q", got)
	}
	last.client.Close()
	v.client.Close()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r = b.runtime(t)
	i, err := r.Attach(testContext(t), last.ID)
	if err != nil {
		t.Fatal(err)
	}
	last = &vm{Sandbox: last.Sandbox, Instance: i, client: agent.New(i.Dial, i.Done()), container: v.ID}
	if got := last.sh(t, "cat /kept"); got != "kept" {
		t.Errorf("attached, its disk says %q", got)
	}
	last.client.Close()
}

// TestSnapshotOfAClone: a clone's memory is its template's but for what it wrote, and what goes on from it needs no template.
func TestSnapshotOfAClone(t *testing.T) {
	b := newBench(t)
	b.useTemplates()
	r := b.runtime(t)
	if r.hub != nil {
		t.Skip("a clone is reached over the kernel's vsock here: run this on a host without /dev/vhost-vsock")
	}
	key := b.template(t, r, b.sandbox())
	s := b.sandbox()
	s.Snapshots = true
	v := b.startSandbox(t, r, s)
	if f := v.Facts(); f.StartedFrom == startedCold {
		t.Fatalf("started from %q (%s)", f.StartedFrom, f.StartNote)
	}
	v.sh(t, "echo kept >/kept")
	dir := take(t, v)
	if err := r.templates.drop(key); err != nil {
		t.Fatal(err)
	}
	if got := b.restoreFrom(t, r, v, dir).sh(t, "cat /kept"); got != "kept" {
		t.Errorf("its disk says %q", got)
	}
}

// TestDamagedSnapshotIsRefused: whichever of its files is damaged, and nothing is left of what was to go on from it.
func TestDamagedSnapshotIsRefused(t *testing.T) {
	b := newBench(t)
	r := b.runtime(t)
	s := b.sandbox()
	s.Snapshots = true
	v := b.startSandbox(t, r, s)
	dir := take(t, v)
	for _, name := range []string{stateFile, snapshotDiskFile, snapshotMetaFile} {
		path := filepath.Join(dir, name)
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		broken := append([]byte{}, whole...)
		for i := range 16 {
			broken[len(broken)/2+i] ^= 0xff
		}
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, broken, 0o600); err != nil {
			t.Fatal(err)
		}
		other := b.sandbox()
		if _, err := r.Restore(testContext(t), other, dir); spec.KindOf(err) != spec.KindWrongState || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("%s damaged: %v", name, err)
		}
		left, err := r.List(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range left {
			if id == other.ID {
				t.Errorf("%s damaged: something of the VM is left", name)
			}
		}
		if err := os.WriteFile(path, whole, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b.restoreFrom(t, r, v, dir)
}

// TestSnapshotNeedsAPort: a VM that was not made for it runs on.
func TestSnapshotNeedsAPort(t *testing.T) {
	b := newBench(t)
	r := b.runtime(t)
	v := b.start(t, r)
	_, err := v.Instance.(runtime.Snapshotter).Snapshot(testContext(t), t.TempDir(), runtime.SnapshotHooks{})
	if spec.KindOf(err) != spec.KindWrongState || !strings.Contains(err.Error(), "--snapshots") {
		t.Errorf("got %v", err)
	}
	if got := v.sh(t, "echo on"); got != "on" {
		t.Errorf("it says %q", got)
	}
}

func goodMeta() snapshotMeta {
	return snapshotMeta{Format: snapshotFormat, Accelerator: accelTCG, QEMU: "q", CPUs: 1, MemoryBytes: 256 << 20, DiskBytes: 64 << 20, Token: strings.Repeat("00", spec.TokenLen)}
}

// TestSnapshotMetaIsChecked: each of its values has bounds, and what does not fit this host is said.
func TestSnapshotMetaIsChecked(t *testing.T) {
	for name, change := range map[string]func(*snapshotMeta){
		"format": func(m *snapshotMeta) { m.Format++ },
		"cpus":   func(m *snapshotMeta) { m.CPUs = 0 },
		"memory": func(m *snapshotMeta) { m.MemoryBytes = 1 << 60 },
		"disk":   func(m *snapshotMeta) { m.DiskBytes = 0 },
		"token":  func(m *snapshotMeta) { m.Token = "00" },
	} {
		m := goodMeta()
		change(&m)
		b, _ := json.Marshal(m)
		if _, err := parseSnapshotMeta(b); spec.KindOf(err) != spec.KindWrongState {
			t.Errorf("%s: %v", name, err)
		}
	}
	m := goodMeta()
	if m.fits(accelKVM, "q") == nil || m.fits(accelTCG, "other") == nil || m.fits(accelTCG, "q") != nil {
		t.Error("what fits this host is taken for what does not")
	}
}

// FuzzSnapshotMeta: whatever is in the file, what is accepted is within bounds.
func FuzzSnapshotMeta(f *testing.F) {
	b, _ := json.Marshal(goodMeta())
	f.Add(b)
	f.Add([]byte(`{"format":1,"cpus":4294967295}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := parseSnapshotMeta(b)
		if err != nil {
			return
		}
		if m.CPUs < 1 || m.CPUs > maxCPUs || m.MemoryBytes > maxSnapshotBytes || len(m.Token) != 2*spec.TokenLen {
			t.Errorf("accepted %+v", m)
		}
	})
}
