//go:build linux

package client

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// testPipes are pipes as a daemon gives them, and the ends that a process would have.
func testPipes(t *testing.T) (*pipes, [2]*os.File) {
	t.Helper()
	p := &pipes{}
	var theirs [2]*os.File
	for i := range theirs {
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		if err := unix.SetNonblock(fds[0], true); err != nil {
			t.Fatal(err)
		}
		p.ends[i], theirs[i] = os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
		t.Cleanup(func() { theirs[i].Close() })
	}
	t.Cleanup(p.close)
	return p, theirs
}

func noFailure(t *testing.T) func() { return func() { t.Error("carrying failed") } }

// Whatever output goes to, it arrives whole. The reader of the pipe is slow, so that the pipe is full most of the time, also
// when the output ends.
func TestCarryToEveryKindOfFile(t *testing.T) {
	content := make([]byte, 3<<20+17)
	rand.NewChaCha8([32]byte{2}).Read(content)
	dir := t.TempDir()
	for name, open := range map[string]func() (io.Writer, func() []byte){
		"pipe": func() (io.Writer, func() []byte) {
			r, w, err := os.Pipe()
			if err != nil {
				t.Fatal(err)
			}
			got := make(chan []byte, 1)
			go func() {
				var all bytes.Buffer
				buf := make([]byte, 32<<10)
				for {
					time.Sleep(100 * time.Microsecond)
					n, err := r.Read(buf)
					all.Write(buf[:n])
					if err != nil {
						got <- all.Bytes()
						return
					}
				}
			}()
			return w, func() []byte { w.Close(); return <-got }
		},
		"file":                  fileAt(t, filepath.Join(dir, "f"), os.O_RDWR|os.O_CREATE),
		"file that is added to": fileAt(t, filepath.Join(dir, "a"), os.O_RDWR|os.O_CREATE|os.O_APPEND),
		"memory": func() (io.Writer, func() []byte) {
			b := &bytes.Buffer{}
			return b, b.Bytes
		},
	} {
		t.Run(name, func(t *testing.T) {
			p, theirs := testPipes(t)
			w, got := open()
			p.carry(w, io.Discard, noFailure(t))
			go func() {
				theirs[0].Write(content)
				theirs[0].Close()
				theirs[1].Close()
			}()
			p.done.Wait() // without p.finish: the end of the output must be noticed by itself
			if err := p.finish(); err != nil {
				t.Fatal(err)
			}
			if b := got(); sha256.Sum256(b) != sha256.Sum256(content) {
				t.Errorf("%d bytes arrived, not the %d that were written", len(b), len(content))
			}
		})
	}
}

func fileAt(t *testing.T, path string, flags int) func() (io.Writer, func() []byte) {
	return func() (io.Writer, func() []byte) {
		f, err := os.OpenFile(path, flags, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		return f, func() []byte {
			f.Close()
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			return b
		}
	}
}

// A descendant that holds the output open keeps nobody waiting once the process has ended; what it still writes in time arrives.
func TestCarryLingers(t *testing.T) {
	p, theirs := testPipes(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p.carry(w, io.Discard, noFailure(t))
	if _, err := theirs[0].WriteString("before"); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	time.AfterFunc(100*time.Millisecond, func() { theirs[0].WriteString(" after") })
	if err := p.finish(); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(began); took < lingerLimit {
		t.Errorf("waited %v, less than %v", took, lingerLimit)
	}
	w.Close()
	if got, _ := io.ReadAll(r); string(got) != "before after" {
		t.Errorf("%q arrived", got)
	}
}

// A reader who has gone is told as any writer is told; and it ends the process.
func TestCarryToNobody(t *testing.T) {
	p, theirs := testPipes(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	r.Close()
	failed := make(chan struct{}, 2)
	p.carry(w, io.Discard, func() { failed <- struct{}{} })
	go theirs[0].WriteString("lost")
	select {
	case <-failed:
	case <-time.After(patience):
		t.Fatal("nobody was told")
	}
	if err := p.giveUp(); !errors.Is(err, syscall.EPIPE) {
		t.Errorf("%v, want EPIPE", err)
	}
}

// eventually waits for what tells nobody that it has come about.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("never: " + what)
		}
	}
}

// awaitFull waits until nothing more can be written to a pipe: POLLOUT says that there is room for a page.
func awaitFull(t *testing.T, w *os.File) {
	t.Helper()
	conn, err := w.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the pipe is full", func() bool {
		var ready int
		var perr error
		if err := conn.Control(func(fd uintptr) {
			ready, perr = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, 0)
		}); err != nil || perr != nil && !errors.Is(perr, unix.EINTR) {
			t.Fatal(err, perr)
		}
		return ready == 0 && perr == nil
	})
}

// awaitHeldUp waits until whoever carries output has found its target full, by its goroutine's stack.
func awaitHeldUp(t *testing.T) {
	t.Helper()
	all := make([]byte, 1<<20)
	eventually(t, "what carries waits for room", func() bool {
		return strings.Contains(string(all[:goruntime.Stack(all, true)]), "client.(*pipes).awaitRoom(")
	})
}

// Who gives up while nobody reads is not held up.
func TestGiveUpWhileFull(t *testing.T) {
	p, theirs := testPipes(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p.carry(w, io.Discard, noFailure(t))
	written := make(chan error, 1)
	go func() {
		_, err := theirs[0].Write(make([]byte, 1<<20))
		written <- err
	}()
	awaitFull(t, w)
	awaitFull(t, theirs[0])
	done := make(chan error, 1)
	go func() { done <- p.giveUp() }()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("held up")
	}
	if err := <-written; !errors.Is(err, syscall.EPIPE) {
		t.Errorf("the process's write: %v, want EPIPE", err)
	}
}

// The end of the output is noticed also when it comes while the target is full.
func TestCarryEndsWhileFull(t *testing.T) {
	p, theirs := testPipes(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	size, err := unix.FcntlInt(w.Fd(), unix.F_GETPIPE_SZ, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(make([]byte, size)); err != nil {
		t.Fatal(err)
	}
	p.carry(w, io.Discard, noFailure(t))
	theirs[0].Close()
	theirs[1].Close()
	done := make(chan struct{})
	go func() { p.done.Wait(); close(done) }()
	awaitHeldUp(t)
	if _, err := io.CopyN(io.Discard, r, int64(size)); err != nil {
		t.Fatal(err)
	}
	select {
	case <-done:
	case <-time.After(patience):
		t.Fatal("the end was missed")
	}
}
