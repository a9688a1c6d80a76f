package console

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
	"unicode"
)

func readAll(t *testing.T, path string) []string {
	t.Helper()
	var lines []string
	err := Read(path, func(e Entry) error {
		if d := time.Since(e.Time); d < 0 || d > time.Minute {
			t.Errorf("time %v", e.Time)
		}
		lines = append(lines, e.Text)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

func open(t *testing.T, path string) *Log {
	t.Helper()
	l, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func say(t *testing.T, s *Source, text string) {
	t.Helper()
	if n, err := s.Write([]byte(text)); n != len(text) || err != nil {
		t.Fatalf("%d of %d bytes, %v", n, len(text), err)
	}
}

func TestLinesOfSeveralSources(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console.log")
	if lines := readAll(t, path); len(lines) != 0 {
		t.Errorf("before anything was said: %q", lines)
	}
	l := open(t, path)
	var seen []string
	kernel, vmm := l.Source("", func(line string) { seen = append(seen, line) }), l.Source("qemu: ", nil)
	say(t, kernel, "one\r\nt")
	say(t, vmm, "cannot\n")
	say(t, kernel, "wo\n\n")
	say(t, kernel, "begun")
	if err := kernel.Flush(); err != nil {
		t.Fatal(err)
	}
	got := strings.Join(readAll(t, path), "|")
	if want := "one|qemu: cannot|two|begun"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if got := strings.Join(seen, "|"); got != "one|two|begun" {
		t.Errorf("seen: %q", got)
	}
	if got := kernel.Quote(); got != "one two begun" {
		t.Errorf("quote %q", got)
	}
	// The next daemon goes on.
	say(t, open(t, path).Source("", nil), "three\n")
	if got := readAll(t, path); got[len(got)-1] != "three" || len(got) != 5 {
		t.Errorf("%q", got)
	}
}

// Whoever speaks may want to fill the disk, or to drive the terminal of who reads.
func TestHostileSource(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "console.log")
	s := open(t, path).Source("", nil)
	say(t, s, "\x1b]0;owned\a\x1b[2J\\x41\xff\u202eevil\u0085\x00\n")
	if got, want := readAll(t, path)[0], `\x1b]0;owned\x07\x1b[2J\\x41\xff\xe2\x80\xaeevil\xc2\x85`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	long := strings.Repeat("\x01", 3*maxLine)
	for i := range 300 {
		say(t, s, fmt.Sprintf("%s%d\n", long, i))
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 2 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, f := range files {
		if info, err := f.Info(); err != nil || info.Size() > maxFile+maxStored || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %d bytes, mode %v, %v", f.Name(), info.Size(), info.Mode(), err)
		}
	}
	lines := readAll(t, path)
	if last := lines[len(lines)-1]; last != "299" {
		t.Errorf("the last line is %q", last)
	}
	if q := s.Quote(); len(q) > 2*maxQuote+16 || strings.ContainsFunc(q, func(r rune) bool { return !unicode.IsPrint(r) }) {
		t.Errorf("quote of %d bytes: %q", len(q), q)
	}
}

// FuzzSource: what a guest says on its console, in whatever pieces, comes out as lines that a terminal only shows.
func FuzzSource(f *testing.F) {
	f.Add([]byte("line\nand \x1b[2J more\r\n\xff\xfe"), uint8(3))
	f.Add([]byte(strings.Repeat("\n", 100)), uint8(1))
	f.Add(bytes.Repeat([]byte{0}, 3*maxLine), uint8(200))
	f.Fuzz(func(t *testing.T, said []byte, piece uint8) {
		path := filepath.Join(t.TempDir(), "console.log")
		s := open(t, path).Source("", nil)
		for step := 1 + 16*int(piece); len(said) > 0; {
			n := min(step, len(said))
			if _, err := s.Write(said[:n]); err != nil {
				t.Fatal(err)
			}
			said = said[n:]
		}
		if err := s.Flush(); err != nil {
			t.Fatal(err)
		}
		for _, line := range readAll(t, path) {
			if len(line) > maxStored || strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) }) {
				t.Errorf("a line of %d bytes: %q", len(line), line)
			}
		}
	})
}

func TestQuoteKeepsBothEnds(t *testing.T) {
	l := open(t, "")
	s := l.Source("", nil)
	say(t, s, "fatal error: first\n")
	for range 100 {
		say(t, s, "goroutine something or other\n")
	}
	say(t, s, "the end\n")
	q := s.Quote()
	if !strings.HasPrefix(q, "fatal error: first ") || !strings.HasSuffix(q, " the end") || !strings.Contains(q, "…") {
		t.Errorf("%q", q)
	}
}

// A link where the log should be leads nowhere.
func TestOpenFollowsNoLink(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(filepath.Join(dir, "elsewhere"), filepath.Join(dir, "console.log")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(filepath.Join(dir, "console.log")); err == nil {
		t.Error("a link was followed")
	}
}
