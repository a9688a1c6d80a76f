package microvm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/bootid"
)

// What a record says, whatever has become of its file. The process is the test's own: it is there, with that start time.
func TestRecordsThatAreNotWhole(t *testing.T) {
	started, err := startTime(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	boot, err := bootid.Host()
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		what  string
		spoil func(whole string) string
		// Whether its processes are still those; else whether there is an error.
		runs, fails bool
	}{
		{"whole", func(w string) string { return w }, true, false},
		{"of a daemon that noted no boot", func(w string) string { return strings.Replace(w, `"boot":"`+boot+`",`, "", 1) }, true, false},
		{"of another boot", func(w string) string { return strings.Replace(w, boot, "00000000-0000-4000-8000-000000000000", 1) }, false, false},
		{"cut off", func(w string) string { return w[:len(w)/2] }, false, true},
		{"empty", func(string) string { return "" }, false, true},
		{"a bit flipped", func(w string) string { return "\xfb" + w[1:] }, false, true},
		{"something else", func(string) string { return "[1, 2]" }, false, true},
		{"larger than any", func(w string) string { return w + strings.Repeat(" ", maxRecord) }, false, true},
	} {
		dir := t.TempDir()
		if err := (record{ID: "x", QEMU: process{os.Getpid(), started}}).save(dir); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, recordFile)
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		spoilt := c.spoil(string(whole))
		if c.what != "whole" && spoilt == string(whole) {
			t.Fatalf("%s: nothing was spoilt", c.what)
		}
		if err := os.WriteFile(path, []byte(spoilt), 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := loadRecord(dir)
		if c.fails != (err != nil) {
			t.Errorf("%s: %v", c.what, err)
		}
		// By this, too, does killAll choose whom to kill.
		pidfd, err := r.QEMU.open()
		if err == nil {
			_ = pidfd.Close()
		} else if !errors.Is(err, errGone) {
			t.Fatal(err)
		}
		if runs := err == nil; runs != c.runs {
			t.Errorf("%s: its process is said to run: %t", c.what, runs)
		}
	}
}
