package e2e

import (
	"crypto/sha256"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCopyFile(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		dir := t.TempDir()
		in, out := filepath.Join(dir, "in"), filepath.Join(dir, "out")
		content := make([]byte, 20<<20)
		if _, err := io.ReadFull(rand.NewChaCha8([32]byte{2}), content); err != nil {
			t.Fatal(err)
		}
		must(t, os.WriteFile(in, content, 0o640))
		w.Call(t, "cp", in, id+":/tmp/")
		w.Exec(id, "stat", "-c", "%a %s %u", "/tmp/in").Run().WantOut(t, "640 20971520 0\n")
		w.Call(t, "cp", in, id+":/tmp/renamed")
		w.Call(t, "cp", id+":/tmp/renamed", out)
		got, err := os.ReadFile(out)
		must(t, err)
		if sha256.Sum256(got) != sha256.Sum256(content) {
			t.Errorf("20 MiB went in, %d bytes came out, and they differ", len(got))
		}
		w.Command("cp", id+":/no/such/file", out).Run().WantError(t, 125, "/no/such/file")
		w.Command("cp", filepath.Join(dir, "missing"), id+":/tmp/").Run().WantError(t, 125, "missing")
	})
}

func TestCopyDirectory(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		dir := t.TempDir()
		tree := filepath.Join(dir, "tree")
		must(t, os.MkdirAll(filepath.Join(tree, "below", "empty"), 0o755))
		must(t, os.WriteFile(filepath.Join(tree, "below", "script"), []byte("#!/bin/sh\necho ran\n"), 0o755))
		must(t, os.Symlink("below/script", filepath.Join(tree, "link")))
		w.Call(t, "cp", tree, id+":/tmp")
		w.Exec(id, "/tmp/tree/link").Run().WantOut(t, "ran\n")
		back := filepath.Join(dir, "back")
		must(t, os.Mkdir(back, 0o755))
		w.Call(t, "cp", id+":/tmp/tree", back)
		target, err := os.Readlink(filepath.Join(back, "tree", "link"))
		if err != nil || target != "below/script" {
			t.Errorf("link points to %q, %v", target, err)
		}
		info, err := os.Stat(filepath.Join(back, "tree", "below", "script"))
		if err != nil || info.Mode().Perm() != 0o755 {
			t.Errorf("script is %v, %v", info, err)
		}
		if _, err := os.Stat(filepath.Join(back, "tree", "below", "empty")); err != nil {
			t.Error(err)
		}
	})
}

// What is in a sandbox is hostile: a link there must lead neither the daemon nor sandboxctl out of where it is copying.
func TestCopyStaysInside(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		secret := filepath.Join(t.TempDir(), "secret")
		must(t, os.WriteFile(secret, []byte("of the host"), 0o600))
		w.Exec(id, "ln", "-s", secret, "/tmp/escape").Run().Want(t, 0)
		w.Exec(id, "ln", "-s", filepath.Dir(secret), "/tmp/escape-dir").Run().Want(t, 0)
		out := filepath.Join(t.TempDir(), "out")
		w.Command("cp", id+":/tmp/escape", out).Run()
		if b, err := os.ReadFile(out); err == nil && strings.Contains(string(b), "of the host") {
			// A link that was copied as a link resolves here, on the host, to the host's own file: that is no escape.
			if info, err := os.Lstat(out); err != nil || info.Mode()&os.ModeSymlink == 0 {
				t.Error("cp followed a link of the sandbox to a file of the host")
			}
		}
		in := filepath.Join(t.TempDir(), "in")
		must(t, os.WriteFile(in, []byte("from outside"), 0o600))
		w.Command("cp", in, id+":/tmp/escape-dir/secret").Run()
		b, err := os.ReadFile(secret)
		if err != nil || string(b) != "of the host" {
			t.Errorf("cp followed a link of the sandbox and overwrote a file of the host: %q, %v", b, err)
		}
	})
}
