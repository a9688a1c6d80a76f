package container

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/bootid"
	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

// What a record says, whatever has become of its file. The process is the test's own: it is there, with that start time.
func TestRecordsThatAreNotWhole(t *testing.T) {
	started, err := processStartTime(os.Getpid())
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
		// Whether it is still of a sandbox that runs; else what the error says, nothing for none.
		runs bool
		err  string
	}{
		{"whole", func(w string) string { return w }, true, ""},
		{"of a daemon that noted no boot", func(w string) string { return strings.Replace(w, `"boot":"`+boot+`",`, "", 1) }, true, ""},
		{"of another boot", func(w string) string { return strings.Replace(w, boot, "00000000-0000-4000-8000-000000000000", 1) }, false, ""},
		{"cut off", func(w string) string { return w[:len(w)/2] }, false, "cannot decode"},
		{"empty", func(string) string { return "" }, false, "cannot decode"},
		{"a bit flipped", func(w string) string { return "\xfb" + w[1:] }, false, "cannot decode"},
		{"of another version", func(w string) string { return strings.Replace(w, `"version":2`, `"version":9`, 1) }, false, "version is 9"},
		{"something else", func(string) string { return "[1, 2]" }, false, "cannot decode"},
		{"larger than any", func(w string) string { return w + strings.Repeat(" ", maxRecord) }, false, "cannot read"},
	} {
		dir := t.TempDir()
		if err := writeRecord(dir, record{ID: "x", Ready: true, PID: os.Getpid(), StartTime: started}); err != nil {
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
		if err := wholefile.Replace(path, []byte(spoilt)); err != nil {
			t.Fatal(err)
		}
		r, err := readRecord(dir)
		if c.err == "" && err != nil || c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)) {
			t.Errorf("%s: error %v, want %q", c.what, err, c.err)
		}
		pidfd, err := openProcess(r.PID, r.StartTime)
		if err == nil {
			_ = pidfd.Close()
		} else if !errors.Is(err, errProcessGone) {
			t.Fatal(err)
		}
		if runs := r.Ready && err == nil; runs != c.runs {
			t.Errorf("%s: its sandbox is said to run: %t", c.what, runs)
		}
	}
}
