package guest

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// swapRounds is how often a tree is copied whose directory is all the while exchanged for a link, each way: without what keeps
// copies inside, tens of them were enough.
const swapRounds = 1500

// swapping exchanges two names for as long as the test runs, and answers with how often it did.
func swapping(t *testing.T, a, b string) *atomic.Int64 {
	t.Helper()
	var stop atomic.Bool
	swaps, stopped := new(atomic.Int64), make(chan error, 1)
	go func() {
		for !stop.Load() {
			if err := unix.Renameat2(unix.AT_FDCWD, a, unix.AT_FDCWD, b, unix.RENAME_EXCHANGE); err != nil {
				stopped <- err
				return
			}
			swaps.Add(1)
		}
		stopped <- nil
	}()
	t.Cleanup(func() {
		stop.Store(true)
		if err := <-stopped; err != nil {
			t.Error(err)
		}
	})
	return swaps
}

// TestCopyWhileSwapped: a directory that is exchanged for a link, again and again, leads no copy out of the root, and none out of
// the tree is led out of that. test/e2e/attack runs it without each of the protections, and there it fails.
func TestCopyWhileSwapped(t *testing.T) {
	dir := t.TempDir()
	for name, content := range map[string]string{"root/tree/d/f": "inside", "root/outside/f": "BESIDE", "outside/f": "SECRET"} {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	tree := filepath.Join(dir, "root/tree")
	if err := os.Symlink("../../outside", tree+"/l"); err != nil { // of the root's parent, or, inside, of the root
		t.Fatal(err)
	}
	root, err := openDir(filepath.Join(dir, "root"))
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var in bytes.Buffer
	w := tar.NewWriter(&in)
	if err := w.WriteHeader(&tar.Header{Name: "d/written", Typeflag: tar.TypeReg, Mode: 0o600, Uid: os.Getuid(), Gid: os.Getgid()}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}

	swaps := swapping(t, tree+"/d", tree+"/l")
	var packed, named, unpacked int
	for range swapRounds {
		var all, one bytes.Buffer
		if pack(root, "tree", &all) == nil {
			packed++
		}
		if pack(root, "tree/d", &one) == nil {
			named++
		}
		if unpack(root, "tree", bytes.NewReader(in.Bytes())) == nil {
			unpacked++
		}
		for name, out := range map[string][]byte{"the tree": all.Bytes(), "a name in it": one.Bytes()} {
			if bytes.Contains(out, []byte("SECRET")) {
				t.Fatalf("a copy of %s has a file that is outside of the root", name)
			}
		}
		if bytes.Contains(all.Bytes(), []byte("BESIDE")) {
			t.Fatal("a copy of the tree has a file that is outside of it")
		}
		if names, err := os.ReadDir(filepath.Join(dir, "outside")); err != nil || len(names) != 1 {
			t.Fatalf("a copy in wrote outside of the root: %v, %v", names, err)
		}
	}
	if packed == 0 || named == 0 || unpacked == 0 || swaps.Load() < swapRounds {
		t.Errorf("of %d copies each, %d, %d and %d came to an end, during %d exchanges", swapRounds, packed, named, unpacked, swaps.Load())
	}
}
