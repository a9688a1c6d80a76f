package main

import (
	"archive/tar"
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"
)

// swapRounds is how often something is copied in each direction.
const swapRounds = 1000

// TestCopyWhileSwapped: whoever exchanges a directory here for a link while it is copied to, or from, has nothing outside of it
// written or read. test/e2e/attack runs it without each of the protections, and there it fails.
func TestCopyWhileSwapped(t *testing.T) {
	dir := t.TempDir()
	tree, outside := filepath.Join(dir, "tree"), filepath.Join(dir, "outside")
	writeFile(t, tree+"/d/f", "inside")
	writeFile(t, outside+"/f", "SECRET")
	if err := os.Symlink(outside, tree+"/l"); err != nil {
		t.Fatal(err)
	}
	var stop atomic.Bool
	stopped := make(chan error, 1)
	go func() {
		for !stop.Load() {
			if err := unix.Renameat2(unix.AT_FDCWD, tree+"/d", unix.AT_FDCWD, tree+"/l", unix.RENAME_EXCHANGE); err != nil {
				stopped <- err
				return
			}
		}
		stopped <- nil
	}()
	defer func() {
		stop.Store(true)
		if err := <-stopped; err != nil {
			t.Error(err)
		}
	}()
	var packed, unpacked int
	for range swapRounds {
		var out bytes.Buffer
		w := tar.NewWriter(&out)
		if packTree(t.Context(), w, tree, "tree", false) == nil {
			packed++
		}
		if bytes.Contains(out.Bytes(), []byte("SECRET")) {
			t.Fatal("a copy in has a file from outside of its source")
		}
		// As an earlier copy of the sandbox's may have left it.
		_, err := unpackAt(t, makeTar(t, tar.Header{Name: "tree/", Typeflag: tar.TypeDir, Mode: 0o755}, tar.Header{Name: "tree/d/written", Typeflag: tar.TypeReg, Mode: 0o600}), target{dir: dir, name: "tree"})
		if err == nil {
			unpacked++
		}
		names, err := os.ReadDir(outside)
		if err != nil || len(names) != 1 {
			t.Fatalf("a copy out wrote outside of its destination: %v, %v", names, err)
		}
	}
	if packed == 0 || unpacked == 0 {
		t.Errorf("%d copies in and %d out came to an end", packed, unpacked)
	}
	f, err := os.Open(outside + "/f")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if b, err := io.ReadAll(f); err != nil || strings.TrimSpace(string(b)) != "SECRET" {
		t.Errorf("outside: %q, %v", b, err)
	}
}
