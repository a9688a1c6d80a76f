package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	goruntime "runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

// patienceOfTests bounds every wait of the tests.
const patienceOfTests = 30 * time.Second

// fakeDaemon runs one workload that a test ends.
type fakeDaemon struct {
	sandboxdv1.UnimplementedWorkloadServiceServer
	exec    func(grpc.BidiStreamingServer[sandboxdv1.ExecRequest, sandboxdv1.ExecResponse]) error
	running chan struct{} // closed by the start
	signals chan string
	exit    chan int32
	deleted chan string
	// What a removal answers.
	deleteError error
}

func newFakeDaemon() *fakeDaemon {
	return &fakeDaemon{
		running: make(chan struct{}), signals: make(chan string, 8), exit: make(chan int32, 1), deleted: make(chan string, 1),
	}
}

func (f *fakeDaemon) CreateWorkload(context.Context, *sandboxdv1.CreateWorkloadRequest) (*sandboxdv1.CreateWorkloadResponse, error) {
	return &sandboxdv1.CreateWorkloadResponse{Workload: &sandboxdv1.Workload{Id: "theid"}}, nil
}

func (f *fakeDaemon) StartWorkload(context.Context, *sandboxdv1.StartWorkloadRequest) (*sandboxdv1.StartWorkloadResponse, error) {
	close(f.running)
	return &sandboxdv1.StartWorkloadResponse{Workload: &sandboxdv1.Workload{Id: "theid"}}, nil
}

func (f *fakeDaemon) KillWorkload(_ context.Context, r *sandboxdv1.KillWorkloadRequest) (*sandboxdv1.KillWorkloadResponse, error) {
	f.signals <- r.GetId() + " " + r.GetSignal()
	return &sandboxdv1.KillWorkloadResponse{}, nil
}

func (f *fakeDaemon) DeleteWorkload(_ context.Context, r *sandboxdv1.DeleteWorkloadRequest) (*sandboxdv1.DeleteWorkloadResponse, error) {
	f.deleted <- r.GetId()
	return &sandboxdv1.DeleteWorkloadResponse{}, f.deleteError
}

func (f *fakeDaemon) Attach(s grpc.BidiStreamingServer[sandboxdv1.AttachRequest, sandboxdv1.AttachResponse]) error {
	if err := s.Send(&sandboxdv1.AttachResponse{Response: &sandboxdv1.AttachResponse_Started{Started: &sandboxdv1.AttachStarted{}}}); err != nil {
		return err
	}
	select {
	case code := <-f.exit:
		if err := s.Send(&sandboxdv1.AttachResponse{Response: &sandboxdv1.AttachResponse_Stdout{Stdout: []byte("bye")}}); err != nil {
			return err
		}
		return s.Send(&sandboxdv1.AttachResponse{Response: &sandboxdv1.AttachResponse_Exit{Exit: &sandboxdv1.ProcessExit{Code: code}}})
	case <-s.Context().Done():
		return s.Context().Err()
	}
}

func (f *fakeDaemon) Exec(s grpc.BidiStreamingServer[sandboxdv1.ExecRequest, sandboxdv1.ExecResponse]) error {
	return f.exec(s)
}

// listen serves the fake until the test ends.
func (f *fakeDaemon) listen(t *testing.T) (address string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	sandboxdv1.RegisterWorkloadServiceServer(s, f)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return "unix://" + path
}

// start runs a command line against the fake and gives its exit code.
func (f *fakeDaemon) start(t *testing.T, args ...string) (code <-chan int, stdout, stderr *bytes.Buffer) {
	t.Helper()
	address := f.listen(t)
	a, stdout, stderr := quiet(formatTable)
	done := make(chan int, 1)
	go func() { done <- a.main(append([]string{"--address", address}, args...)) }()
	return done, stdout, stderr
}

func soon[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patienceOfTests):
		t.Fatalf("%s did not happen", what)
		panic("unreachable")
	}
}

func TestRunExitsAndRemoves(t *testing.T) {
	f := newFakeDaemon()
	code, stdout, _ := f.start(t, "run", "--rm", "image", "command")
	soon(t, f.running, "the start")
	f.exit <- 7
	if got := soon(t, code, "the end"); got != 7 || stdout.String() != "bye" {
		t.Errorf("exit code %d and output %q, want 7 and bye", got, stdout)
	}
	if got := soon(t, f.deleted, "the removal"); got != "theid" {
		t.Errorf("%q was removed", got)
	}
}

// Whoever runs a command wants to know how it ended, also when something is left behind.
func TestRunTellsTheCodeWhenRemovalFails(t *testing.T) {
	f := newFakeDaemon()
	f.deleteError = status.Error(codes.Internal, "a mount is busy")
	code, _, stderr := f.start(t, "run", "--rm", "image", "command")
	soon(t, f.running, "the start")
	f.exit <- 7
	if got := soon(t, code, "the end"); got != 7 || !strings.Contains(stderr.String(), "a mount is busy") {
		t.Errorf("exit code %d and error output %q, want 7 and why the removal failed", got, stderr)
	}
}

func TestExecExits(t *testing.T) {
	f := newFakeDaemon()
	f.exec = func(s grpc.BidiStreamingServer[sandboxdv1.ExecRequest, sandboxdv1.ExecResponse]) error {
		first, err := s.Recv()
		if err != nil {
			return err
		}
		if got := strings.Join(first.GetStart().GetCommand(), " "); got != "cmd --flag" {
			t.Errorf("command %q", got)
		}
		if err := s.Send(&sandboxdv1.ExecResponse{Response: &sandboxdv1.ExecResponse_Started{Started: &sandboxdv1.ExecStarted{Pid: 2}}}); err != nil {
			return err
		}
		if err := s.Send(&sandboxdv1.ExecResponse{Response: &sandboxdv1.ExecResponse_Stderr{Stderr: []byte("oops")}}); err != nil {
			return err
		}
		return s.Send(&sandboxdv1.ExecResponse{Response: &sandboxdv1.ExecResponse_Exit{Exit: &sandboxdv1.ProcessExit{Code: 137, Signal: 9}}})
	}
	code, _, stderr := f.start(t, "exec", "theid", "cmd", "--flag")
	if got := soon(t, code, "the end"); got != 137 || stderr.String() != "oops" {
		t.Errorf("exit code %d and error output %q, want 137 and oops", got, stderr)
	}
}

// running is a process that goes on until the test ends.
func running(t *testing.T) *client.Process {
	t.Helper()
	f := newFakeDaemon()
	f.exec = func(s grpc.BidiStreamingServer[sandboxdv1.ExecRequest, sandboxdv1.ExecResponse]) error {
		err := s.Send(&sandboxdv1.ExecResponse{Response: &sandboxdv1.ExecResponse_Started{Started: &sandboxdv1.ExecStarted{Pid: 2}}})
		<-s.Context().Done()
		return err
	}
	c, err := client.Dial(f.listen(t))
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.Exec(t.Context(), &sandboxdv1.ExecStart{Id: "x", Command: []string{"x"}}, client.Stdio{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Close()
		c.Close()
	})
	return p
}

func endedBy(t *testing.T, s *session) error {
	t.Helper()
	soon(t, s.ctx.Done(), "the end of the session")
	return context.Cause(s.ctx)
}

func TestSignalBeforeTheStartEndsTheSession(t *testing.T) {
	a, _, _ := quiet(formatTable)
	s := a.newSession(t.Context(), false, false, nil)
	defer s.close()
	s.signals <- syscall.SIGINT
	if err := endedBy(t, s); err != exitStatus(130) {
		t.Errorf("it ended with %v, want exit status 130", err)
	}
}

// What a person sends goes to the process; one who insists is heard all the same.
func TestSignalsGoToTheProcess(t *testing.T) {
	a, _, _ := quiet(formatTable)
	sent := make(chan string, 8)
	s := a.newSession(t.Context(), false, false, func(_ context.Context, _ *client.Process, name string) error {
		sent <- name
		return nil
	})
	defer s.close()
	if err := s.start(running(t)); err != nil {
		t.Fatal(err)
	}
	// The loop learns of the start and of signals by different channels.
	for len(s.started) > 0 {
		goruntime.Gosched()
	}
	for _, c := range []struct {
		signal syscall.Signal
		want   string
	}{{syscall.SIGUSR1, "10"}, {syscall.SIGTERM, "15"}, {syscall.SIGUSR2, "12"}, {syscall.SIGINT, "2"}} {
		s.signals <- c.signal
		if got := soon(t, sent, "the signal"); got != c.want {
			t.Errorf("signal %s, want %s", got, c.want)
		}
	}
	if s.ctx.Err() != nil {
		t.Fatalf("the session ended: %v", context.Cause(s.ctx))
	}
	s.signals <- syscall.SIGTERM // the third that asks to end
	if err := endedBy(t, s); err != exitStatus(143) {
		t.Errorf("it ended with %v, want exit status 143", err)
	}
}

// A signal that cannot reach the process, since it reads no input, ends this program, and the process with it.
func TestSignalThatDoesNotGetThrough(t *testing.T) {
	a, _, _ := quiet(formatTable)
	tried := make(chan string, 8)
	s := a.newSession(t.Context(), false, false, func(_ context.Context, _ *client.Process, name string) error {
		tried <- name
		return context.DeadlineExceeded
	})
	defer s.close()
	if err := s.start(running(t)); err != nil {
		t.Fatal(err)
	}
	for len(s.started) > 0 {
		goruntime.Gosched()
	}
	// One that does not ask to end is not worth it.
	s.signals <- syscall.SIGUSR1
	soon(t, tried, "the try")
	s.signals <- syscall.SIGINT
	if err := endedBy(t, s); err != exitStatus(130) {
		t.Errorf("it ended with %v, want exit status 130", err)
	}
}

// With -t alone nobody passes on what is typed: ctrl-C must stay a signal.
func TestTerminalIsRawOnlyForInput(t *testing.T) {
	for _, stdin := range []bool{false, true} {
		a, _, _ := quiet(formatTable)
		tty := openTerminal(t)
		a.stdin = tty
		signals := func() bool {
			state, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
			if err != nil {
				t.Fatal(err)
			}
			return state.Lflag&unix.ISIG != 0
		}
		s := a.newSession(t.Context(), true, stdin, nil)
		if err := s.start(running(t)); err != nil {
			t.Fatal(err)
		}
		if signals() == stdin {
			t.Errorf("stdin %v: the terminal makes signals: %v", stdin, signals())
		}
		if s.terminal.size() == nil {
			t.Errorf("stdin %v: the terminal has no size", stdin)
		}
		s.close()
		if !signals() {
			t.Errorf("stdin %v: the terminal stays raw", stdin)
		}
	}
}

// openTerminal gives the side of a pseudo terminal that programs see.
func openTerminal(t *testing.T) *os.File {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { master.Close() })
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetUint32(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tty.Close() })
	return tty
}
