package agent_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// copyTime has nanoseconds, and is not now.
var copyTime = time.Date(2021, 2, 3, 4, 5, 6, 789012345, time.UTC)

func tarOf(t *testing.T, headers ...tar.Header) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		content := strings.Repeat("x", int(h.Size))
		h.Format = tar.FormatPAX
		if h.ModTime.IsZero() {
			h.ModTime = copyTime
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func readTar(t *testing.T, r io.Reader) map[string]*tar.Header {
	t.Helper()
	entries := map[string]*tar.Header{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return entries
		}
		if err != nil {
			t.Fatal(err)
		}
		entries[h.Name] = h
	}
}

// TestCopyKeepsEverything sends a tree in and takes it out again.
func TestCopyKeepsEverything(t *testing.T) {
	s := newSandbox(t)
	sent := []tar.Header{
		{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o2750, Uid: 3, Gid: 4},
		{Name: "d/file", Typeflag: tar.TypeReg, Mode: 0o4751, Uid: 1000, Gid: 44, Size: 1 << 20, PAXRecords: map[string]string{
			"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
			"SCHILY.xattr.user.note":           "bin\x00ary",
		}},
		{Name: "d/hard", Typeflag: tar.TypeLink, Linkname: "d/file", Mode: 0o4751, Uid: 1000, Gid: 44},
		{Name: "d/soft", Typeflag: tar.TypeSymlink, Linkname: "/etc/../nowhere", Mode: 0o777, Uid: 5, Gid: 6},
		{Name: "d/fifo", Typeflag: tar.TypeFifo, Mode: 0o622, Uid: 1},
		{Name: "d/empty", Typeflag: tar.TypeReg, Mode: 0o600},
		{Name: "d/sub/", Typeflag: tar.TypeDir, Mode: 0o700},
		{Name: "d/sub/" + strings.Repeat("long", 50), Typeflag: tar.TypeReg, Mode: 0o644, Size: 3},
	}
	if err := s.CopyIn(t.Context(), theContainer, "/tmp", tarOf(t, sent...)); err != nil {
		t.Fatal(err)
	}
	if got := s.sh("stat -c '%a %u %g %s %h' /tmp/d/file; readlink /tmp/d/soft; cat /tmp/d/hard | tr -d x | wc -c; stat -c %Y /tmp/d"); got !=
		"4751 1000 44 1048576 2\n/etc/../nowhere\n0\n"+fmt.Sprint(copyTime.Unix()) {
		t.Errorf("inside: %q", got)
	}
	var stream bytes.Buffer
	if err := s.CopyOut(t.Context(), theContainer, "/tmp/d", &stream); err != nil {
		t.Fatal(err)
	}
	got := readTar(t, &stream)
	for _, want := range sent {
		h := got[want.Name]
		if h == nil {
			t.Errorf("%s is missing", want.Name)
			continue
		}
		delete(got, want.Name)
		// Which of two hard links comes first is the directory's choice.
		if want.Name == "d/file" || want.Name == "d/hard" {
			if h.Typeflag == tar.TypeLink {
				if other := map[string]string{"d/file": "d/hard", "d/hard": "d/file"}[want.Name]; h.Linkname != other {
					t.Errorf("%s links to %s", want.Name, h.Linkname)
				}
				continue
			}
			want = sent[1]
		}
		if h.Typeflag != want.Typeflag || h.Mode != want.Mode || h.Uid != want.Uid || h.Gid != want.Gid || h.Size != want.Size ||
			h.Linkname != want.Linkname || !h.ModTime.Equal(copyTime) {
			t.Errorf("%s: got %+v, want %+v", want.Name, h, want)
		}
		for key, value := range want.PAXRecords {
			if h.PAXRecords[key] != value {
				t.Errorf("%s: %s is %q, want %q", want.Name, key, h.PAXRecords[key], value)
			}
		}
	}
	if len(got) > 0 {
		t.Errorf("unasked for: %v", slices.Collect(maps.Keys(got)))
	}
}

func TestCopyOutNames(t *testing.T) {
	s := newSandbox(t)
	s.sh("ln -s /etc /tmp/link; ln -s ../../../../etc/passwd /tmp/up; echo x >/tmp/-rf")
	for _, c := range []struct{ path, has string }{
		{"/etc/passwd", "passwd"},
		{"/etc/", "etc/group"},
		{"/tmp/link", "link/passwd"}, // resolved, under its own name
		{"/tmp/up", "up"},
		{"/", "proc/"},
		{"/tmp", "tmp/-rf"},
	} {
		var stream bytes.Buffer
		if err := s.CopyOut(t.Context(), theContainer, c.path, &stream); err != nil {
			t.Errorf("%s: %v", c.path, err)
			continue
		}
		got := readTar(t, &stream)
		if got[c.has] == nil {
			t.Errorf("%s: no %s in %v", c.path, c.has, slices.Collect(maps.Keys(got)))
		}
		for name := range got {
			if strings.HasPrefix(name, "proc/1") || strings.HasPrefix(name, "/") || strings.Contains(name, "..") {
				t.Errorf("%s: has %s", c.path, name)
			}
		}
	}
}

func TestCopyRefuses(t *testing.T) {
	s := newSandbox(t)
	file := tar.Header{Typeflag: tar.TypeReg, Mode: 0o644, Size: 1}
	named := func(name string) tar.Header { h := file; h.Name = name; return h }
	for name, entries := range map[string][]tar.Header{
		"up":          {named("../x")},
		"up inside":   {named("a/../../x")},
		"absolute":    {named("/x")},
		"hard link":   {{Name: "l", Typeflag: tar.TypeLink, Linkname: "../etc/passwd"}},
		"owner":       {{Name: "o", Typeflag: tar.TypeReg, Uid: 70000}},
		"device":      {{Name: "c", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3}},
		"dir on file": {named("f"), {Name: "f", Typeflag: tar.TypeDir}},
	} {
		err := s.CopyIn(t.Context(), theContainer, "/tmp", tarOf(t, entries...))
		if spec.KindOf(err) != spec.KindInvalid {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if err := s.CopyIn(t.Context(), theContainer, "/nowhere", tarOf(t, named("x"))); spec.KindOf(err) != spec.KindInvalid {
		t.Errorf("no directory: %v", err)
	}
	if err := s.CopyIn(t.Context(), theContainer, "/tmp", strings.NewReader(strings.Repeat("no tar ", 1000))); spec.KindOf(err) != spec.KindInvalid {
		t.Errorf("no tar: %v", err)
	}
	if err := s.CopyOut(t.Context(), theContainer, "/nowhere", io.Discard); spec.KindOf(err) != spec.KindNotFound || err.(*spec.Error).Field != "path" || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("no such file: %v", err)
	}
}

// TestCopyGivenUp: a copy that nobody wants any more is ended and forgotten.
func TestCopyGivenUp(t *testing.T) {
	s := newSandbox(t)
	s.sh("dd if=/dev/zero of=/tmp/big bs=1048576 count=0 seek=1048576 2>/dev/null") // 1 TiB, sparse
	ctx, cancel := context.WithCancel(t.Context())
	w := &cancelling{after: 8 << 20, cancel: cancel}
	if err := s.CopyOut(ctx, theContainer, "/tmp/big", w); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	if got := s.sh("ls -d /proc/[0-9]* | wc -l"); got != "4" { // the agent, sh, ls, wc
		t.Errorf("%s processes: %s", got, s.sh("ps"))
	}
}

type cancelling struct {
	after  int
	cancel func()
}

func (c *cancelling) Write(p []byte) (int, error) {
	if c.after -= len(p); c.after < 0 {
		c.cancel()
	}
	return len(p), nil
}

// TestCopyHostileTree: what a workload can build does not stop the agent.
func TestCopyHostileTree(t *testing.T) {
	s := newSandbox(t)
	script := "cd /home; mkfifo pipe; ln -s pipe link; ln -s self self; i=0; while [ $i -lt 3000 ]; do : >f$i; i=$((i+1)); done"
	s.sh(script)
	var stream bytes.Buffer
	if err := s.CopyOut(t.Context(), theContainer, "/home", &stream); err != nil {
		t.Fatal(err)
	}
	if got := readTar(t, &stream); len(got) != 3000+5 { // home, user, pipe, link, self
		t.Errorf("%d entries", len(got))
	}
	if err := s.CopyOut(t.Context(), theContainer, "/home/self", io.Discard); spec.KindOf(err) != spec.KindInvalid {
		t.Errorf("a loop of links: %v", err)
	}
	if err := s.CopyOut(t.Context(), theContainer, "/home/link", &stream); err != nil {
		t.Errorf("a FIFO: %v", err)
	}
}
