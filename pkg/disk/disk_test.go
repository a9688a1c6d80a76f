package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// debugfs asks e2fsprogs about a layer without mounting it.
func debugfs(t *testing.T, path, command string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "/usr/sbin/debugfs", "-R", command, path).CombinedOutput()
	if err != nil {
		t.Fatalf("debugfs: %v: %s", err, out)
	}
	return string(out)
}

func TestCreateMakesACleanSparseFileSystem(t *testing.T) {
	for _, size := range []uint64{MinSize, 64 << 20, 1 << 30, 10 << 30} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			m := NewMaker(filepath.Join(t.TempDir(), "cache"))
			path := filepath.Join(t.TempDir(), "disk.ext4")
			for range 2 { // the second is a copy of a cached template
				if err := os.RemoveAll(path); err != nil {
					t.Fatal(err)
				}
				if err := m.Create(path, size); err != nil {
					t.Fatal(err)
				}
			}
			if out, err := exec.CommandContext(t.Context(), "/usr/sbin/e2fsck", "-fn", path).CombinedOutput(); err != nil {
				t.Errorf("e2fsck: %v: %s", err, out)
			}
			used, limit, err := Usage(path)
			if err != nil || limit != size {
				t.Errorf("Usage: limit %d, %v, want %d", limit, err, size)
			}
			if used > 8<<20 || used > size/4 {
				t.Errorf("a fresh layer of %d bytes occupies %d", size, used)
			}
			for name, mode := range map[string]string{"/upper": "0755", "/work": "0700"} {
				out := debugfs(t, path, "stat "+name)
				if !strings.Contains(out, "Mode:  "+mode) || !strings.Contains(out, "User:     0   Group:     0") {
					t.Errorf("%s: want root's, mode %s: %s", name, mode, out)
				}
			}
			if out := debugfs(t, path, "features"); strings.Contains(out, "has_journal") {
				t.Errorf("features: %s", out)
			}
		})
	}
}

func TestCreateRefuses(t *testing.T) {
	m := NewMaker(filepath.Join(t.TempDir(), "cache"))
	for _, size := range []uint64{0, MinSize - 1, MaxSize + blockSize} {
		if err := m.Create(filepath.Join(t.TempDir(), "d"), size); spec.KindOf(err) != spec.KindInvalid {
			t.Errorf("Create(%d) = %v, want KindInvalid", size, err)
		}
	}
	there := filepath.Join(t.TempDir(), "there")
	if err := os.WriteFile(there, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := m.Create(there, MinSize); err == nil {
		t.Error("Create overwrote a file")
	}
	if b, err := os.ReadFile(there); err != nil || string(b) != "precious" {
		t.Errorf("the file that was there is %q, %v", b, err)
	}
}

func TestTemplatesAreBoundedAndShared(t *testing.T) {
	cache := filepath.Join(t.TempDir(), "cache")
	dir := t.TempDir()
	var wg sync.WaitGroup
	for i := range 8 { // as if by several daemons
		wg.Go(func() {
			m := NewMaker(cache)
			for j := range 2 {
				if err := m.Create(filepath.Join(dir, fmt.Sprintf("%d-%d", i, j)), MinSize); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	m := NewMaker(cache)
	for i := range uint64(maxTemplates + 3) {
		if err := m.Create(filepath.Join(dir, fmt.Sprintf("s%d", i)), MinSize+i*blockSize); err != nil {
			t.Fatal(err)
		}
	}
	entries, err := os.ReadDir(cache)
	if err != nil || len(entries) != maxTemplates {
		t.Errorf("%d files in the cache, %v, want %d", len(entries), err, maxTemplates)
	}
}

func TestRepair(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.ext4")
	if err := NewMaker(filepath.Join(t.TempDir(), "cache")).Create(path, 16<<20); err != nil {
		t.Fatal(err)
	}
	if err := Repair(t.Context(), path); err != nil {
		t.Fatalf("of a clean layer: %v", err)
	}
	// An unclean state and a wrong free block count, as a killed VM leaves them.
	for _, command := range []string{"set_super_value state 0", "set_super_value free_blocks_count 3"} {
		if out, err := exec.CommandContext(t.Context(), "/usr/sbin/debugfs", "-w", "-R", command, path).CombinedOutput(); err != nil {
			t.Fatalf("debugfs: %v: %s", err, out)
		}
	}
	if clean, err := isClean(path); err != nil || clean {
		t.Fatalf("isClean = %v, %v after the state was cleared", clean, err)
	}
	if err := Repair(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	if clean, err := isClean(path); err != nil || !clean {
		t.Errorf("isClean = %v, %v after Repair", clean, err)
	}
	if out, err := exec.CommandContext(t.Context(), "/usr/sbin/e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck after Repair: %v: %s", err, out)
	}
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Repair(t.Context(), path); err == nil {
		t.Error("Repair took a file of zeros for a layer")
	}
}

func TestLayerIsKeptAndBelongsToItsMaker(t *testing.T) {
	state := t.TempDir()
	m := NewMaker(filepath.Join(state, "cache"))
	path, created, err := m.Layer(state, "a", "container", MinSize)
	if err != nil || !created || path != LayerPath(state, "a") {
		t.Fatalf("Layer = %s, %v, %v", path, created, err)
	}
	if err := os.WriteFile(path+".tmp", nil, 0o600); err != nil { // as a daemon that died leaves
		t.Fatal(err)
	}
	if again, created, err := m.Layer(state, "a", "container", 2*MinSize); err != nil || created || again != path {
		t.Errorf("Layer again = %s, %v, %v", again, created, err)
	}
	if _, _, err := m.Layer(state, "a", "microvm", MinSize); err == nil {
		t.Error("a layer changed its runtime")
	}
	if err := os.Mkdir(filepath.Join(state, layersDir, "half"), 0o700); err != nil {
		t.Fatal(err)
	}
	for owner, want := range map[string]string{"container": "[a half]", "microvm": "[half]"} {
		if ids, err := Layers(state, owner); err != nil || fmt.Sprint(ids) != want {
			t.Errorf("Layers(%s) = %v, %v, want %s", owner, ids, err, want)
		}
	}
	for range 2 {
		if err := RemoveLayer(state, "a"); err != nil {
			t.Error(err)
		}
	}
	if err := os.Symlink(t.TempDir(), filepath.Join(state, layersDir, "link")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := m.Layer(state, "link", "container", MinSize); err == nil {
		t.Error("Layer followed a symbolic link")
	}
}

func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for loop devices: run the tests as root")
	}
}

// backing is the file behind a loop device, empty when the device is free.
func backing(loop string) string {
	b, err := os.ReadFile("/sys/block/" + filepath.Base(loop) + "/loop/backing_file")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

func TestAttachLoop(t *testing.T) {
	needRoot(t)
	dir := t.TempDir()
	var wg sync.WaitGroup
	for i := range 12 { // more than the eight nodes a host starts with
		wg.Go(func() {
			path := filepath.Join(dir, fmt.Sprint(i))
			if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
				t.Error(err)
				return
			}
			f, err := os.OpenFile(path, os.O_RDWR, 0)
			if err != nil {
				t.Error(err)
				return
			}
			defer f.Close() //nolint:errcheck // a test's
			readOnly := i%2 == 0
			loop, err := AttachLoop(f, readOnly)
			if err != nil {
				t.Error(err)
				return
			}
			if got := backing(loop.Name()); got != path {
				t.Errorf("%s is behind %s, want %s", got, loop.Name(), path)
			}
			w, err := os.OpenFile(loop.Name(), os.O_RDWR, 0)
			if err == nil {
				_, err = w.WriteAt([]byte("x"), 0)
				if err == nil {
					err = w.Sync()
				}
				_ = w.Close()
			}
			if (err == nil) == readOnly {
				t.Errorf("readOnly=%v: a write answered %v", readOnly, err)
			}
			_ = loop.Close()
		})
	}
	wg.Wait()
	// Only now, and not at once: one that raced for a device kept it open for an instant, udev looks at each new one, and
	// the last to close it frees it.
	for i := range 12 {
		if err := WaitDetached(t.Context(), filepath.Join(dir, fmt.Sprint(i))); err != nil {
			t.Error(err)
		}
	}
}

// A device that stays attached must be seen, or two mounts of one layer follow.
func TestWaitDetachedSeesTheDevice(t *testing.T) {
	needRoot(t)
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close() //nolint:errcheck // a test's
	loop, err := AttachLoop(f, true)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Dir(path), link); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{path, filepath.Join(link, "disk")} {
		if err := WaitDetached(ctx, p); !errors.Is(err, context.Canceled) {
			t.Errorf("WaitDetached(%s) = %v while %s is attached", p, err, loop.Name())
		}
	}
	if err := os.Remove(path); err != nil { // the device keeps the file
		t.Fatal(err)
	}
	if err := WaitDetached(ctx, path); !errors.Is(err, context.Canceled) {
		t.Errorf("WaitDetached of a deleted file = %v", err)
	}
	_ = loop.Close()
	if err := WaitDetached(t.Context(), path); err != nil {
		t.Error(err)
	}
}

func BenchmarkCreate1GiB(b *testing.B) {
	m := NewMaker(filepath.Join(b.TempDir(), "cache"))
	dir := b.TempDir()
	if err := m.Create(filepath.Join(dir, "warm"), 1<<30); err != nil {
		b.Fatal(err)
	}
	for b.Loop() {
		path := filepath.Join(dir, "d")
		if err := m.Create(path, 1<<30); err != nil {
			b.Fatal(err)
		}
		if err := unix.Unlink(path); err != nil {
			b.Fatal(err)
		}
	}
}
