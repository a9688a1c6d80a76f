package server

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// frame is what a client says to a process, whether it exec'd it or attached to it. One field is set.
type frame struct {
	stdin      []byte
	closeStdin bool
	resize     *sandboxdv1.TerminalSize
	signal     string
	// A second start: an error.
	start bool
}

// conversation is the part of an Exec or Attach stream in which both differ only in their messages.
type conversation struct {
	session workload.Session
	recv    func() (frame, error)
	output  func(stream workload.Stream, data []byte) error
	exit    func(*sandboxdv1.ProcessExit) error
	// Whether the end of the client's stream closes the process's standard input. So it is with a process that has only
	// this one client; others may still come to write to a workload's own process.
	endClosesStdin bool
}

func (s *workloadService) Exec(stream grpc.BidiStreamingServer[sandboxdv1.ExecRequest, sandboxdv1.ExecResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return firstError(err)
	}
	start := first.GetStart()
	if start == nil {
		return errNoStart
	}
	if err := checkArgs("start.command", start.GetCommand()); err != nil {
		return err
	}
	began := time.Now()
	session, err := s.exec(stream.Context(), start)
	if s.Metrics != nil {
		s.Metrics.Exec(s.isolationOf(workload.Workload{}, start.GetId()), err, time.Since(began))
	}
	if err != nil {
		return err
	}
	started := &sandboxdv1.ExecResponse_Started{Started: &sandboxdv1.ExecStarted{Pid: int32(session.PID())}}
	if err := stream.Send(&sandboxdv1.ExecResponse{Response: started}); err != nil {
		return errors.Join(err, session.Close())
	}
	return s.converse(stream.Context(), conversation{
		session: session,
		recv: func() (frame, error) {
			r, err := stream.Recv()
			return frame{
				stdin: r.GetStdin(), closeStdin: r.GetCloseStdin() != nil, resize: r.GetResize(), signal: r.GetSignal(),
				start: r.GetStart() != nil,
			}, err
		},
		output: func(which workload.Stream, data []byte) error {
			r := &sandboxdv1.ExecResponse{Response: &sandboxdv1.ExecResponse_Stdout{Stdout: data}}
			if which == workload.Stderr {
				r.Response = &sandboxdv1.ExecResponse_Stderr{Stderr: data}
			}
			return stream.Send(r)
		},
		exit: func(e *sandboxdv1.ProcessExit) error {
			return stream.Send(&sandboxdv1.ExecResponse{Response: &sandboxdv1.ExecResponse_Exit{Exit: e}})
		},
		endClosesStdin: true,
	})
}

// exec starts a process whose output comes through the stream, or through pipes that the caller has.
func (s *workloadService) exec(ctx context.Context, start *sandboxdv1.ExecStart) (workload.Session, error) {
	if len(start.GetOutputPipes()) == 0 {
		return s.Workloads.Exec(ctx, start.GetId(), execFromAPI(start))
	}
	caller, _ := callerOf(ctx)
	ends, err := s.pipes.take(start.GetOutputPipes(), caller.Key())
	if err != nil {
		return nil, err
	}
	return s.Workloads.ExecInto(ctx, start.GetId(), execFromAPI(start), ends)
}

func (s *workloadService) Attach(stream grpc.BidiStreamingServer[sandboxdv1.AttachRequest, sandboxdv1.AttachResponse]) error {
	first, err := stream.Recv()
	if err != nil {
		return firstError(err)
	}
	start := first.GetStart()
	if start == nil {
		return errNoStart
	}
	session, err := s.Workloads.Attach(stream.Context(), start.GetId(), start.GetFromStart())
	if err != nil {
		return err
	}
	started := &sandboxdv1.AttachResponse_Started{Started: &sandboxdv1.AttachStarted{}}
	if err := stream.Send(&sandboxdv1.AttachResponse{Response: started}); err != nil {
		return errors.Join(err, session.Close())
	}
	return s.converse(stream.Context(), conversation{
		session: session,
		recv: func() (frame, error) {
			r, err := stream.Recv()
			return frame{
				stdin: r.GetStdin(), closeStdin: r.GetCloseStdin() != nil, resize: r.GetResize(), signal: r.GetSignal(),
				start: r.GetStart() != nil,
			}, err
		},
		output: func(which workload.Stream, data []byte) error {
			r := &sandboxdv1.AttachResponse{Response: &sandboxdv1.AttachResponse_Stdout{Stdout: data}}
			if which == workload.Stderr {
				r.Response = &sandboxdv1.AttachResponse_Stderr{Stderr: data}
			}
			return stream.Send(r)
		},
		exit: func(e *sandboxdv1.ProcessExit) error {
			return stream.Send(&sandboxdv1.AttachResponse{Response: &sandboxdv1.AttachResponse_Exit{Exit: e}})
		},
	})
}

// converse carries a conversation until the process has ended and all its output is sent, or until the client goes.
// Both directions hold each other back only through the process: output is read from it as fast as the client takes it,
// input is received as fast as the process takes it.
func (s *workloadService) converse(ctx context.Context, c conversation) (err error) {
	defer func() { err = errors.Join(err, c.session.Close()) }()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)

	// The receiver cannot be waited for here: its recv ends only when this handler has returned. Stop waits for it.
	s.receivers.Go(func() {
		if err := s.guarded("input", func() error { return c.receive(ctx) }); err != nil {
			cancel(err)
		}
	})

	exit, err := s.untilExit(ctx, c)
	if err == nil {
		return c.exit(exitToAPI(exit))
	}
	// What the receiver met is why the context ended.
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// untilExit sends output until it ends, and answers with the exit.
func (s *workloadService) untilExit(ctx context.Context, c conversation) (exit spec.Exit, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var waitErr error
	var waiter sync.WaitGroup
	waiter.Go(func() {
		// Beside the output: its end is decided by this, too.
		waitErr = s.guarded("wait", func() (err error) {
			exit, err = c.session.Wait(ctx)
			return err
		})
	})
	err = c.session.Output(ctx, func(which workload.Stream, data []byte) error {
		return pieces(data, func(piece []byte) error { return c.output(which, piece) })
	})
	if err != nil {
		cancel()
	}
	waiter.Wait()
	if err != nil {
		return spec.Exit{}, err
	}
	return exit, waitErr
}

// receive hands what the client sends to the process until the client ends its stream; an error ends the conversation.
func (c *conversation) receive(ctx context.Context) error {
	for {
		f, err := c.recv()
		if errors.Is(err, io.EOF) {
			if c.endClosesStdin {
				return c.tolerate(ctx, c.session.CloseStdin(ctx))
			}
			return nil
		}
		if err != nil {
			return err
		}
		if err := c.tolerate(ctx, c.hand(ctx, f)); err != nil {
			return err
		}
	}
}

func (c *conversation) hand(ctx context.Context, f frame) error {
	switch {
	case f.start:
		return errTwoStarts
	case f.closeStdin:
		return c.session.CloseStdin(ctx)
	case f.resize != nil:
		return c.session.Resize(ctx, sizeFromAPI(f.resize))
	case f.signal != "":
		return c.session.Signal(ctx, f.signal)
	case len(f.stdin) > 0:
		return c.session.Write(ctx, f.stdin)
	}
	return nil
}

// tolerate drops the errors of input that came too late: the process has closed its input or has ended, and the client
// will learn so from the exit. What the client did wrong stays an error.
func (c *conversation) tolerate(ctx context.Context, err error) error {
	switch {
	case err == nil, errors.Is(err, io.ErrClosedPipe):
		return nil
	case ctx.Err() != nil:
		return nil
	case spec.KindOf(err) == spec.KindWrongState, spec.KindOf(err) == spec.KindNotFound:
		return nil
	}
	return err
}
