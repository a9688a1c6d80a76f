package rawfork

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// spawned spawns a child that executes a program with its standard output in a pipe, and answers with what came of it.
func spawned(t *testing.T, plan func(c *Calls), program string, args ...string) (output string, report []byte, calls *Calls) {
	t.Helper()
	return run(t, func(c *Calls, status uintptr) (*Child, error) { return c.Spawn(0, nil, status) }, plan, program, args...)
}

func run(t *testing.T, fork func(c *Calls, status uintptr) (*Child, error), plan func(c *Calls), program string, args ...string) (output string, report []byte, calls *Calls) {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Fatal(err)
	}
	out, theirOut, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	status, theirStatus, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer status.Close()
	calls = &Calls{}
	calls.Must("standard output", unix.SYS_DUP3, theirOut.Fd(), 1, 0)
	if plan != nil {
		plan(calls)
	}
	calls.ResetSignals()
	file, err := calls.Text(path)
	if err != nil {
		t.Fatal(err)
	}
	argv := []*byte{}
	for _, a := range append([]string{program}, args...) {
		p, err := unix.BytePtrFromString(a)
		if err != nil {
			t.Fatal(err)
		}
		argv = append(argv, p)
	}
	argv = append(argv, nil)
	env := []*byte{nil}
	calls.Execute(path, unix.SYS_EXECVE, file, Address(calls, &argv[0]), Address(calls, &env[0]))
	child, err := fork(calls, theirStatus.Fd())
	theirOut.Close()
	theirStatus.Close()
	if err != nil {
		t.Fatal(err)
	}
	if child.PIDFD != nil {
		defer child.PIDFD.Close()
	}
	report, err = io.ReadAll(status)
	child.Hold()
	if err != nil {
		t.Error(err)
	}
	b, err := io.ReadAll(out)
	if err != nil {
		t.Error(err)
	}
	if _, err := unix.Wait4(child.PID, nil, 0, nil); err != nil {
		t.Error(err)
	}
	return string(b), report, calls
}

func TestSpawnExecutes(t *testing.T) {
	out, report, _ := spawned(t, nil, "echo", "a", "b")
	if out != "a b\n" || len(report) != 0 {
		t.Errorf("the child said %q, and reported %x", out, report)
	}
}

func TestSpawnReportsTheCallThatFailed(t *testing.T) {
	_, report, calls := spawned(t, func(c *Calls) {
		c.Must("a descriptor that is not open", unix.SYS_FCHDIR, 1<<20)
	}, "echo")
	call, errno, err := calls.Failed(report)
	if err != nil || errno != unix.EBADF || call.What != "a descriptor that is not open" {
		t.Errorf("reported %+v, %v, %v", call, errno, err)
	}
}

// A child of a program that listens to signals has them all by default again.
func TestSpawnedHasNoSignalsBlocked(t *testing.T) {
	out, _, _ := spawned(t, nil, "cat", "/proc/self/status")
	for _, what := range []string{"SigBlk", "SigIgn", "SigCgt"} {
		if want := what + ":\t0000000000000000\n"; !strings.Contains(out, want) {
			t.Errorf("the child's status has no %q: %s", want, out)
		}
	}
}

// Children and the memory they share do not get into each other's way, nor into the collector's.
func TestSpawnsAtOnce(t *testing.T) {
	stop := make(chan struct{})
	var collector sync.WaitGroup
	collector.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				runtime.GC()
			}
		}
	})
	var spawners sync.WaitGroup
	for range 4 {
		spawners.Go(func() {
			for range 50 {
				if out, report, _ := spawned(t, nil, "echo", "here"); out != "here\n" {
					t.Errorf("a child said %q, reported %x", out, report)
				}
			}
		})
	}
	spawners.Wait()
	close(stop)
	collector.Wait()
}

func TestSpawnRefusedByTheKernel(t *testing.T) {
	c := &Calls{}
	_, err := c.Spawn(unix.CLONE_NEWUSER|unix.CLONE_FS, nil, 2)
	if !errors.Is(err, unix.EINVAL) {
		t.Errorf("a clone that cannot be: %v", err)
	}
}

// A child's writes reach the caller's memory if that is shared, and no other.
func TestForkSharesMemoryIfAskedTo(t *testing.T) {
	for _, share := range []bool{true, false} {
		word := new([unix.PathMax / 8]uint64)
		out, report, _ := run(t, func(c *Calls, status uintptr) (*Child, error) { return c.Fork(nil, status, share) }, func(c *Calls) {
			c.Must("getcwd", unix.SYS_GETCWD, Address(c, word), unix.PathMax)
			c.Equal("the directory is absolute", &word[0], uint64(0xff), uint64('/'))
		}, "echo", "here")
		if out != "here\n" || len(report) != 0 {
			t.Errorf("share %v: the child said %q, and reported %x", share, out, report)
		}
		if written := word[0] != 0; written != (share && sharedFlags != 0) {
			t.Errorf("share %v: written to the caller's memory: %v", share, written)
		}
	}
}

func TestForkReportsTheCallThatFailed(t *testing.T) {
	for _, share := range []bool{true, false} {
		_, report, calls := run(t, func(c *Calls, status uintptr) (*Child, error) { return c.Fork(nil, status, share) }, func(c *Calls) {
			c.Must("a descriptor that is not open", unix.SYS_FCHDIR, 1<<20)
		}, "echo")
		if call, errno, err := calls.Failed(report); err != nil || errno != unix.EBADF || call.What != "a descriptor that is not open" {
			t.Errorf("share %v: reported %+v, %v, %v", share, call, errno, err)
		}
	}
}
