package audit

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

type entry struct {
	N          int    `json:"n"`
	Fill       string `json:"fill,omitempty"`
	LostBefore uint64 `json:"lost_before,omitempty"`
}

func open(t *testing.T, c Config) *Log {
	t.Helper()
	l, err := Open(c)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func testConfig(t *testing.T) Config {
	return Config{Path: filepath.Join(t.TempDir(), "audit", "audit.log"), SizeBytes: MinSizeBytes, Keep: 3}
}

func lines(t *testing.T, path string) (out []entry) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s := bufio.NewScanner(f)
	s.Buffer(nil, 2*MaxLineBytes)
	for s.Scan() {
		var e entry
		if err := json.Unmarshal(s.Bytes(), &e); err != nil {
			t.Fatalf("%s has a line that is no JSON: %q", path, s.Text())
		}
		out = append(out, e)
	}
	return out
}

func TestEveryCallHasALine(t *testing.T) {
	c := testConfig(t)
	l := open(t, c)
	var calls sync.WaitGroup
	for i := range 50 {
		calls.Go(func() {
			if err := l.Begin(); err != nil {
				t.Error(err)
				return
			}
			if err := l.End(entry{N: i}); err != nil {
				t.Error(err)
			}
		})
	}
	calls.Wait()
	// Another process may read it meanwhile: the lines are there before Close.
	if got := len(lines(t, c.Path)); got != 50 {
		t.Errorf("%d lines, want 50", got)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(c.Path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, want 0600: %v", info.Mode(), err)
	}
	l = open(t, c)
	defer l.Close()
	if err := l.Write(entry{N: 50}); err != nil {
		t.Fatal(err)
	}
	if got := lines(t, c.Path); len(got) != 51 || got[50].N != 50 {
		t.Errorf("after opening it again: %d lines, want 51", len(got))
	}
}

func TestRotatesAndIsBounded(t *testing.T) {
	c := testConfig(t)
	l := open(t, c)
	defer l.Close()
	fill := strings.Repeat("x", 10<<10)
	const n = 1000 // ten times what may be kept
	for i := range n {
		if err := l.Begin(); err != nil {
			t.Fatal(err)
		}
		if err := l.End(entry{N: i, Fill: fill}); err != nil {
			t.Fatal(err)
		}
	}
	files, err := os.ReadDir(filepath.Dir(c.Path))
	if err != nil || len(files) != c.Keep+1 {
		t.Fatalf("%d files, want %d: %v", len(files), c.Keep+1, err)
	}
	next := n - 1
	for i := range c.Keep + 1 {
		var st unix.Stat_t
		if err := unix.Stat(l.older(i), &st); err != nil {
			t.Fatal(err)
		}
		if st.Size > c.SizeBytes || i > 0 && st.Blocks*512 > st.Size+64<<10 {
			t.Errorf("%s has %d bytes and takes %d, want at most %d", l.older(i), st.Size, st.Blocks*512, c.SizeBytes)
		}
		all := lines(t, l.older(i))
		for j := len(all) - 1; j >= 0; j-- {
			if all[j].N != next {
				t.Fatalf("%s: line %d where %d should be", l.older(i), all[j].N, next)
			}
			next--
		}
	}
}

// A line that the host's death cut off does not swallow the one after it.
func TestTornLine(t *testing.T) {
	c := testConfig(t)
	l := open(t, c)
	if err := errors.Join(l.Write(entry{N: 1}), l.Close()); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(c.Path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteString(`{"n":2,"fi`); err != nil {
		t.Fatal(err)
	}
	f.Close()
	l = open(t, c)
	defer l.Close()
	if err := l.Write(entry{N: 3}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(c.Path)
	if want := "{\"n\":1}\n{\"n\":2,\"fi\n{\"n\":3}\n"; string(b) != want {
		t.Errorf("%q, want %q: %v", b, want, err)
	}
}

// On a full disk a call that began before gets its line, one after it does not begin, history stays, and once there is room it
// goes on and says what is missing.
func TestFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("run this test as root: it mounts a small file system")
	}
	onSmallDisk(t, 8<<20, func(dir string) error {
		c := Config{Path: filepath.Join(dir, "audit.log"), SizeBytes: MinSizeBytes, Keep: 50}
		l, err := Open(c)
		if err != nil {
			return err
		}
		defer l.Close()
		if err := l.Begin(); err != nil {
			return err
		}
		hog := filepath.Join(dir, "hog")
		if err := fillUp(hog); err != nil {
			return err
		}
		began, refused := 0, error(nil)
		for refused == nil && began < 2000 {
			if refused = l.Begin(); refused == nil {
				began++
				if err := l.End(entry{N: began, Fill: strings.Repeat("x", 4<<10)}); err != nil {
					return fmt.Errorf("a call that was let begin has no line: %w", err)
				}
			}
		}
		if !errors.Is(refused, unix.ENOSPC) || began == 0 {
			return fmt.Errorf("after %d calls: %w, want no space", began, refused)
		}
		// Room was kept for the first one all along.
		if err := l.End(entry{N: -1}); err != nil {
			return fmt.Errorf("the line of the call that began first: %w", err)
		}
		for l.Lost() == 0 {
			if l.Write(entry{Fill: strings.Repeat("x", 60<<10)}) != nil && l.Lost() == 0 {
				return errors.New("a line that could not be written was not counted")
			}
		}
		if err := os.Remove(hog); err != nil {
			return err
		}
		if err := l.Begin(); err != nil {
			return fmt.Errorf("once there is room: %w", err)
		}
		if err := l.End(entry{N: 7}); err != nil {
			return err
		}
		var last entry
		names, _ := filepath.Glob(c.Path + "*")
		for _, name := range names {
			b, err := os.ReadFile(name)
			if err != nil {
				return err
			}
			for line := range strings.Lines(string(b)) {
				var e entry
				if json.Unmarshal([]byte(line), &e) == nil && e.N == 7 {
					last = max7(last, e)
				}
			}
		}
		if last.LostBefore == 0 {
			return fmt.Errorf("the line after lost ones does not say so: %+v", last)
		}
		return nil
	})
}

func max7(a, b entry) entry {
	if b.LostBefore >= a.LostBefore {
		return b
	}
	return a
}

func fillUp(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer f.Close()
	for _, size := range []int{64 << 10, 512} {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, unix.ENOSPC) {
			return err
		}
	}
	return nil
}

// onSmallDisk calls fn in a thread with a mount namespace of its own, in which dir is a small file system.
func onSmallDisk(t *testing.T, bytes int, fn func(dir string) error) {
	t.Helper()
	dir := t.TempDir()
	if os.Getenv("AUDIT_SMALL_DISK") == "" {
		// The whole process needs the namespace: the log syncs from a goroutine of its own.
		cmd := exec.Command("/proc/self/exe", "-test.run", "^"+t.Name()+"$", "-test.v")
		cmd.Env = append(os.Environ(), "AUDIT_SMALL_DISK=1")
		cmd.SysProcAttr = &unix.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "--- PASS") {
			t.Fatalf("%v\n%s", err, out)
		}
		return
	}
	runtime.LockOSThread()
	if err := unix.Mount("none", dir, "tmpfs", 0, fmt.Sprintf("size=%d", bytes)); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	if err := fn(dir); err != nil {
		t.Fatal(err)
	}
}

func TestRefusesUselessBounds(t *testing.T) {
	for _, c := range []Config{{SizeBytes: 1, Keep: 1}, {SizeBytes: MinSizeBytes}} {
		c.Path = filepath.Join(t.TempDir(), "a")
		if _, err := Open(c); err == nil {
			t.Errorf("%+v is accepted", c)
		}
	}
}
