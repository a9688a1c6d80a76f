package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// fakeSession is a process whose output and end a test decides. Without an output function it runs until its context ends.
type fakeSession struct {
	output func(ctx context.Context, fn func(workload.Stream, []byte) error) error
	wait   func(ctx context.Context) (spec.Exit, error)
	input  func(frame) error
	closed chan struct{}
	once   sync.Once
}

func (s *fakeSession) PID() int { return 42 }

func (s *fakeSession) Output(ctx context.Context, fn func(workload.Stream, []byte) error) error {
	if s.output == nil {
		<-ctx.Done()
		return ctx.Err()
	}
	return s.output(ctx, fn)
}

func (s *fakeSession) Write(_ context.Context, p []byte) error { return s.input(frame{stdin: p}) }
func (s *fakeSession) CloseStdin(context.Context) error        { return s.input(frame{closeStdin: true}) }
func (s *fakeSession) Resize(_ context.Context, size spec.TerminalSize) error {
	return s.input(frame{resize: sizeToAPI(size)})
}
func (s *fakeSession) Signal(_ context.Context, signal string) error {
	return s.input(frame{signal: signal})
}

func (s *fakeSession) Wait(ctx context.Context) (spec.Exit, error) {
	if s.wait == nil {
		<-ctx.Done()
		return spec.Exit{}, ctx.Err()
	}
	return s.wait(ctx)
}

func (s *fakeSession) Close() error {
	if s.closed != nil {
		s.once.Do(func() { close(s.closed) })
	}
	return nil
}

func withSession(s workload.Session) *fakeWorkloads {
	return &fakeWorkloads{
		exec:   func(context.Context, string, spec.Process) (workload.Session, error) { return s, nil },
		attach: func(context.Context, string, bool) (workload.Session, error) { return s, nil },
		get:    func(string) (workload.Workload, error) { return workload.Workload{}, nil },
	}
}

type execStream = grpc.BidiStreamingClient[sandboxdv1.ExecRequest, sandboxdv1.ExecResponse]

// startExec opens an exec and waits until the process is said to run.
func startExec(t *testing.T, h *harness, start *sandboxdv1.ExecStart) execStream {
	t.Helper()
	return startExecIn(t.Context(), t, h, start)
}

func startExecIn(ctx context.Context, t *testing.T, h *harness, start *sandboxdv1.ExecStart) execStream {
	t.Helper()
	stream, err := h.workloads.Exec(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Start{Start: start}}); err != nil {
		t.Fatal(err)
	}
	first, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if first.GetStarted().GetPid() != 42 {
		t.Fatalf("first answer %v, want started with pid 42", first)
	}
	return stream
}

func stdinFrame(s string) *sandboxdv1.ExecRequest {
	return &sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Stdin{Stdin: []byte(s)}}
}

var anExec = &sandboxdv1.ExecStart{Id: "x", Command: []string{"x"}, Stdin: true}

// echo is a process that writes its input back and ends with 7 when its input is closed.
func echo() *fakeSession {
	r, w := io.Pipe()
	return &fakeSession{
		input: func(f frame) error {
			if f.closeStdin {
				return w.Close()
			}
			_, err := w.Write(f.stdin)
			return err
		},
		output: func(_ context.Context, fn func(workload.Stream, []byte) error) error {
			buf := make([]byte, 4096)
			for {
				n, err := r.Read(buf)
				if n > 0 {
					if err := fn(workload.Stdout, bytes.Clone(buf[:n])); err != nil {
						return err
					}
				}
				if errors.Is(err, io.EOF) {
					return fn(workload.Stderr, []byte("end"))
				}
				if err != nil {
					return err
				}
			}
		},
		wait: func(context.Context) (spec.Exit, error) { return spec.Exit{Code: 7}, nil },
	}
}

// collect reads an exec to its end.
func collect(t *testing.T, stream execStream) (stdout, stderr string, exit *sandboxdv1.ProcessExit) {
	t.Helper()
	for {
		r, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return stdout, stderr, exit
		}
		if err != nil {
			t.Fatal(err)
		}
		if exit != nil {
			t.Errorf("%v came after the exit", r)
		}
		stdout += string(r.GetStdout())
		stderr += string(r.GetStderr())
		if r.GetExit() != nil {
			exit = r.GetExit()
		}
	}
}

func TestExecHalfClose(t *testing.T) {
	for name, end := range map[string]func(execStream) error{
		"end of the client's stream": func(s execStream) error { return s.CloseSend() },
		"close_stdin": func(s execStream) error {
			return s.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_CloseStdin{CloseStdin: &sandboxdv1.CloseStdin{}}})
		},
	} {
		t.Run(name, func(t *testing.T) {
			session := echo()
			session.closed = make(chan struct{})
			h := serve(t, Config{Workloads: withSession(session)})
			stream := startExec(t, h, anExec)
			if err := errors.Join(stream.Send(stdinFrame("one ")), stream.Send(stdinFrame("two")), end(stream)); err != nil {
				t.Fatal(err)
			}
			stdout, stderr, exit := collect(t, stream)
			if stdout != "one two" || stderr != "end" || exit.GetCode() != 7 {
				t.Errorf("stdout %q, stderr %q, exit %v; want \"one two\", \"end\", 7", stdout, stderr, exit)
			}
			receive(t, session.closed, "the session's close")
		})
	}
}

// The workload's own process may have other clients: the end of one's stream must not end its input.
func TestAttachEndLeavesStdinOpen(t *testing.T) {
	frames := make(chan frame, 8)
	ended := make(chan struct{})
	session := &fakeSession{
		input: func(f frame) error { frames <- f; return nil },
		output: func(ctx context.Context, _ func(workload.Stream, []byte) error) error {
			select {
			case <-ended:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		},
		wait: func(ctx context.Context) (spec.Exit, error) {
			select {
			case <-ended:
				return spec.Exit{Code: 3}, nil
			case <-ctx.Done():
				return spec.Exit{}, ctx.Err()
			}
		},
	}
	h := serve(t, Config{Workloads: withSession(session)})
	stream, err := h.workloads.Attach(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	send := func(r *sandboxdv1.AttachRequest) {
		t.Helper()
		if err := stream.Send(r); err != nil {
			t.Fatal(err)
		}
	}
	send(&sandboxdv1.AttachRequest{Request: &sandboxdv1.AttachRequest_Start{Start: &sandboxdv1.AttachStart{Id: "x"}}})
	if r, err := stream.Recv(); err != nil || r.GetStarted() == nil {
		t.Fatalf("first answer %v %v, want started", r, err)
	}
	send(&sandboxdv1.AttachRequest{Request: &sandboxdv1.AttachRequest_Resize{Resize: &sandboxdv1.TerminalSize{Rows: 24, Columns: 80}}})
	send(&sandboxdv1.AttachRequest{Request: &sandboxdv1.AttachRequest_Signal{Signal: "TERM"}})
	send(&sandboxdv1.AttachRequest{Request: &sandboxdv1.AttachRequest_Stdin{Stdin: []byte("last")}})
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	if f := receive(t, frames, "the resize"); f.resize.GetRows() != 24 || f.resize.GetColumns() != 80 {
		t.Errorf("%+v, want a resize to 24 x 80", f)
	}
	if f := receive(t, frames, "the signal"); f.signal != "TERM" {
		t.Errorf("%+v, want a signal", f)
	}
	if f := receive(t, frames, "the input"); string(f.stdin) != "last" {
		t.Errorf("%+v, want input", f)
	}
	close(ended)
	r, err := stream.Recv()
	if err != nil || r.GetExit().GetCode() != 3 {
		t.Fatalf("%v %v, want exit 3", r, err)
	}
	h.stop() // the receiver has ended after this
	select {
	case f := <-frames:
		t.Errorf("the end of the stream became %+v", f)
	default:
	}
}

func TestClientThatGoesEndsTheSession(t *testing.T) {
	session := &fakeSession{closed: make(chan struct{}), input: func(frame) error { return nil }}
	h := serve(t, Config{Workloads: withSession(session)})
	ctx, cancel := context.WithCancel(t.Context())
	startExecIn(ctx, t, h, anExec)
	cancel()
	receive(t, session.closed, "the session's close")
}

// Input that comes too late is no error: the client learns from the exit. Input that is wrong is.
func TestInputErrors(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
		want codes.Code
	}{
		{"closed", io.ErrClosedPipe, codes.OK},
		{"gone", spec.Errorf(spec.KindWrongState, "gone"), codes.OK},
		{"wrong", spec.Invalidf("signal", "no such signal"), codes.InvalidArgument},
		{"fault", errors.New("broken"), codes.Internal},
	} {
		t.Run(c.name, func(t *testing.T) {
			handed := make(chan struct{})
			session := &fakeSession{
				input: func(f frame) error {
					if f.signal == "" {
						return nil
					}
					defer close(handed)
					return c.err
				},
				output: func(ctx context.Context, _ func(workload.Stream, []byte) error) error {
					<-handed
					if c.want == codes.OK {
						return nil
					}
					<-ctx.Done()
					return ctx.Err()
				},
				wait: func(context.Context) (spec.Exit, error) { return spec.Exit{Code: 5}, nil },
			}
			h := serve(t, Config{Workloads: withSession(session)})
			stream := startExec(t, h, anExec)
			if err := stream.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Signal{Signal: "TERM"}}); err != nil {
				t.Fatal(err)
			}
			r, err := stream.Recv()
			if status.Code(err) != c.want {
				t.Fatalf("%v %v, want %v", r, err, c.want)
			}
			if c.want == codes.OK && r.GetExit().GetCode() != 5 {
				t.Errorf("%v, want exit 5", r)
			}
		})
	}
}

// A client that does not read holds back the process, and nothing else: what the daemon has buffered for it stays small,
// and other calls on the same connection go on.
func TestSlowReaderHoldsBackOnlyItself(t *testing.T) {
	var produced atomic.Int64
	stuck := make(chan struct{}, 1)
	const piece = 64 << 10
	session := &fakeSession{
		input: func(frame) error { return nil },
		output: func(ctx context.Context, fn func(workload.Stream, []byte) error) error {
			for ctx.Err() == nil {
				late := time.AfterFunc(time.Second, func() {
					select {
					case stuck <- struct{}{}:
					default:
					}
				})
				err := fn(workload.Stdout, make([]byte, piece))
				late.Stop()
				if err != nil {
					return err
				}
				produced.Add(piece)
			}
			return ctx.Err()
		},
	}
	h := serve(t, Config{Workloads: withSession(session)})
	stream := startExec(t, h, anExec)
	receive(t, stuck, "a send that waits for its reader")
	if n := produced.Load(); n > 4<<20 {
		t.Errorf("%d bytes were taken from the process for a client that reads none", n)
	}
	if _, err := h.workloads.GetWorkload(t.Context(), &sandboxdv1.GetWorkloadRequest{Id: "x"}); err != nil {
		t.Errorf("another call on the connection: %v", err)
	}
	// And it goes on once the client reads.
	before := produced.Load()
	for read := int64(0); read < before+4*piece; {
		r, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		read += int64(len(r.GetStdout()))
	}
}

// A process that closes its output and goes on is waited for.
func TestExecOutlivesItsOutput(t *testing.T) {
	end := make(chan struct{})
	session := &fakeSession{
		input:  func(f frame) error { close(end); return nil },
		output: func(context.Context, func(workload.Stream, []byte) error) error { return nil },
		wait: func(ctx context.Context) (spec.Exit, error) {
			<-end
			return spec.Exit{Code: 137, Signal: 9}, nil
		},
	}
	h := serve(t, Config{Workloads: withSession(session)})
	stream := startExec(t, h, anExec)
	if err := stream.Send(stdinFrame("now")); err != nil {
		t.Fatal(err)
	}
	if _, _, exit := collect(t, stream); exit.GetCode() != 137 || exit.GetSignal() != 9 {
		t.Errorf("exit %v, want 137 by signal 9", exit)
	}
}

// What is said long after the process has ended is not cut: only the session knows when its output has.
func TestLateOutputIsNotCut(t *testing.T) {
	const total = 8 << 20
	waited := make(chan struct{})
	session := &fakeSession{
		input: func(frame) error { return nil },
		output: func(ctx context.Context, fn func(workload.Stream, []byte) error) error {
			<-waited
			select {
			case <-time.After(100 * time.Millisecond):
				return fn(workload.Stdout, make([]byte, total))
			case <-ctx.Done():
				return ctx.Err()
			}
		},
		wait: func(context.Context) (spec.Exit, error) {
			close(waited)
			return spec.Exit{}, nil
		},
	}
	h := serve(t, Config{Workloads: withSession(session)})
	if stdout, _, exit := collect(t, startExec(t, h, anExec)); len(stdout) != total || exit == nil {
		t.Errorf("%d bytes and exit %v, want all %d", len(stdout), exit, total)
	}
}
