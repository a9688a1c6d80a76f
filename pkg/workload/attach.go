package workload

import (
	"context"
	"io"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Attach connects to the workload's own process, also before it has started: the session is then with its next run.
// With fromStart the output so far comes first.
func (m *Manager) Attach(ctx context.Context, ref string, fromStart bool) (Session, error) {
	e, err := m.find(ref)
	if err != nil {
		return nil, err
	}
	log, err := e.output()
	if err != nil {
		return nil, err
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	s := &attachSession{e: e, log: log, run: e.rec.Run}
	switch e.rec.Status.State {
	case StateCreated:
		s.run++
	case StateStarting, StateRunning, StatePaused, StateStopping:
	default:
		return nil, e.wrongStateLocked("created or running")
	}
	if !fromStart {
		s.at, _ = log.end()
	}
	return s, nil
}

// attachSession follows the output log, so that a slow reader holds up nobody, and writes to the process.
type attachSession struct {
	e   *entry
	log *outputLog
	// Which run it is with, and where it is in the log.
	run int
	at  logCursor
}

func (s *attachSession) PID() int { return 0 }

// over reports whether the session's run has come to its end.
func (s *attachSession) over(rec record) bool {
	return rec.Run > s.run || rec.Run == s.run && terminal(rec.Status.State) || rec.Status.State == StateDeleting
}

func (s *attachSession) Output(ctx context.Context, fn func(Stream, []byte) error) error {
	return s.e.followLog(ctx, s.log, s.at, s.over, func(le LogEntry) error {
		if le.Dropped > 0 {
			return spec.Errorf(spec.KindExhausted, "%d bytes of the output of workload %q are gone: its log keeps the last %d bytes, and this attachment read too slowly or came too late; attach again to go on, or give it more with --log-size", le.Dropped, s.e.name, s.log.bound())
		}
		return fn(le.Stream, le.Data)
	})
}

// live waits until the session's run has a process to talk to.
func (s *attachSession) live(ctx context.Context) (*run, error) {
	rec, err := s.e.await(ctx, func(rec record) bool {
		return s.over(rec) || rec.Run == s.run && (rec.Status.State == StateRunning || rec.Status.State == StateStopping)
	})
	if err != nil {
		return nil, err
	}
	_, r, _ := s.e.peek()
	if s.over(rec) || r == nil {
		return nil, io.ErrClosedPipe
	}
	return r, nil
}

func (s *attachSession) write(ctx context.Context, p []byte, eof bool) error {
	r, err := s.live(ctx)
	if err != nil {
		if eof {
			return nil
		}
		return err
	}
	r.stdinMu.Lock()
	defer r.stdinMu.Unlock()
	return r.stdin.write(ctx, r.proc, p, eof)
}

func (s *attachSession) Write(ctx context.Context, p []byte) error { return s.write(ctx, p, false) }
func (s *attachSession) CloseStdin(ctx context.Context) error      { return s.write(ctx, nil, true) }

func (s *attachSession) Resize(ctx context.Context, size spec.TerminalSize) error {
	r, err := s.live(ctx)
	if err != nil {
		return err
	}
	return r.proc.Resize(ctx, size)
}

func (s *attachSession) Signal(ctx context.Context, signal string) error {
	sig, err := parseSignal(signal)
	if err != nil {
		return err
	}
	r, err := s.live(ctx)
	if err != nil {
		return err
	}
	return r.proc.Signal(ctx, sig, false)
}

func (s *attachSession) Wait(ctx context.Context) (spec.Exit, error) {
	rec, err := s.e.await(ctx, s.over)
	if err != nil {
		return spec.Exit{}, err
	}
	if rec.Status.State == StateExited && rec.Status.Exit != nil && rec.Run == s.run {
		return *rec.Status.Exit, nil
	}
	return spec.Exit{}, spec.Errorf(spec.KindWrongState, "workload %q is %s and has no exit code: %s", s.e.name, rec.Status.State, rec.Status.Message)
}

func (s *attachSession) Close() error { return nil }
