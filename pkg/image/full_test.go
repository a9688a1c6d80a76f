package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// fullHelper imports into a file system of args[1] bytes, mounted for it alone, and prints what was left.
func fullHelper(args []string) error {
	at := args[0]
	if err := unix.Mount("none", at, "tmpfs", 0, "size="+args[1]); err != nil {
		return fmt.Errorf("cannot mount a tmpfs: %w", err)
	}
	s, err := Open(filepath.Join(at, "images"), nil)
	if err != nil {
		return err
	}
	defer s.Close()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	content := bytes.Repeat([]byte("0123456789abcde\n"), 2<<20/16)
	err = w.WriteHeader(&tar.Header{Name: "big", Mode: 0o644, Size: int64(len(content))})
	_, err2 := w.Write(content)
	if err := errors.Join(err, err2, w.Close()); err != nil {
		return err
	}
	_, err = s.Import(context.Background(), &buf, "x")
	if spec.KindOf(err) != spec.KindExhausted {
		return fmt.Errorf("kind %d, want %d: %w", spec.KindOf(err), spec.KindExhausted, err)
	}
	var left []string
	for _, sub := range []string{erofsDir, tmpDir} {
		entries, err := os.ReadDir(filepath.Join(s.dir, sub))
		if err != nil {
			return err
		}
		for _, e := range entries {
			left = append(left, e.Name())
		}
	}
	images, err := s.List()
	fmt.Printf("left %v %v %v", left, images, err)
	return nil
}

// A full disk, met while the archive comes in or while the image's file is written, is said and leaves nothing.
func TestFullDisk(t *testing.T) {
	for _, size := range []string{"1m", "3m"} {
		t.Run(size, func(t *testing.T) {
			if got, want := string(runHelper(t, "full", t.TempDir(), size)), "left [] [] <nil>"; got != want {
				t.Errorf("got %s, want %s", got, want)
			}
		})
	}
}
