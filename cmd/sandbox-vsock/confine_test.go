package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// insideEnv makes the test program confine itself and try what it must not be able to do.
const insideEnv = "SANDBOX_VSOCK_TEST_INSIDE"

func TestMain(m *testing.M) {
	if os.Getenv(insideEnv) != "" {
		inside()
	}
	os.Exit(m.Run())
}

// attempts are system calls that a taken-over helper would want.
var attempts = []struct {
	name string
	try  func() error
}{
	{"open", func() error { _, err := unix.Open("/etc/passwd", unix.O_RDONLY, 0); return err }},
	{"socket", func() error { _, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM, 0); return err }},
	{"connect", func() error { return unix.Connect(0, &unix.SockaddrUnix{Name: "/run/x"}) }},
	{"fork", func() error {
		_, _, errno := unix.RawSyscall(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0)
		return errno
	}},
	{"exec", func() error { return unix.Exec("/bin/true", []string{"true"}, nil) }},
	{"executable memory", func() error {
		_, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_EXEC, unix.MAP_PRIVATE|unix.MAP_ANON)
		return err
	}},
	{"mprotect", func() error {
		b, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
		if err != nil {
			return fmt.Errorf("plain memory: %w", err)
		}
		return unix.Mprotect(b, unix.PROT_READ|unix.PROT_EXEC)
	}},
	{"ptrace", func() error { return unix.PtraceAttach(1) }},
	{"bpf", func() error { _, _, errno := unix.Syscall(unix.SYS_BPF, 0, 0, 0); return errno }},
	{"memfd", func() error { _, err := unix.MemfdCreate("x", 0); return err }},
	{"kill", func() error { return unix.Kill(1, 0) }},
}

func inside() {
	if err := confine(); err != nil {
		fmt.Println("confine:", err)
		os.Exit(1)
	}
	// On a thread that was there before, and on new ones.
	for _, a := range attempts {
		fmt.Printf("%s: %v\n", a.name, a.try())
	}
	done := make(chan string)
	for range 4 {
		go func() {
			runtime.LockOSThread()
			_, err := unix.Open("/etc/passwd", unix.O_RDONLY, 0)
			done <- fmt.Sprintf("open on another thread: %v", err)
		}()
	}
	for range 4 {
		fmt.Println(<-done)
	}
	useRuntime()
	dumpable, err := unix.PrctlRetInt(unix.PR_GET_DUMPABLE, 0, 0, 0, 0)
	fmt.Println("dumpable:", dumpable, err) // itself denied by the filter
	os.Exit(0)
}

// useRuntime has Go's runtime do what it does only now and then: a system call that it lacks ends the program.
func useRuntime() {
	// Goroutines that are preempted, and as many threads as block in system calls.
	var threads sync.WaitGroup
	for range 8 {
		threads.Go(func() {
			runtime.LockOSThread()
			for end := time.Now().Add(20 * time.Millisecond); time.Now().Before(end); {
			}
			_ = unix.Nanosleep(&unix.Timespec{Nsec: 1e6}, nil)
		})
	}
	threads.Wait()
	// A heap that grows, shrinks and is given back, by a timer of the runtime's own too.
	for range 4 {
		kept := make([][]byte, 0, 1024)
		for range cap(kept) {
			kept = append(kept, make([]byte, 64<<10))
		}
		runtime.KeepAlive(kept)
		runtime.GC()
		time.Sleep(20 * time.Millisecond)
	}
	debug.FreeOSMemory()
}

func TestConfine(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), insideEnv+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	lines := strings.Split(strings.TrimSpace(string(out)), "\n")
	if want := len(attempts) + 5; len(lines) != want {
		t.Fatalf("%d lines, want %d\n%s", len(lines), want, out)
	}
	for _, line := range lines {
		if !strings.HasSuffix(line, unix.EPERM.Error()) {
			t.Errorf("not denied: %s", line)
		}
	}
}

// TestUsage has what every wrong command line must end in: nothing is served.
func TestUsage(t *testing.T) {
	path := t.TempDir() + "/sandbox-vsock"
	if out, err := exec.Command("go", "build", "-o", path, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, args := range []string{"", "--cid 3", "--cid 2 --port 1", "--cid 4294967295 --port 1", "--cid 3 --port 4294967295", "--cid x --port 1", "--cid 3 --port 1 more"} {
		err := exec.CommandContext(t.Context(), path, strings.Fields(args)...).Run()
		code := -1
		if exit, ok := err.(*exec.ExitError); ok {
			code = exit.ExitCode()
		}
		if code != 2 {
			t.Errorf("%q: exit code %d, want 2", args, code)
		}
	}
}
