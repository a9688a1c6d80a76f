package workload

import (
	"context"
	"errors"
	"strconv"
	"syscall"
	"time"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/oci"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Exec starts a further process in a running workload. Empty User, WorkingDir and Env come from the workload;
// Process.Command is the whole argv.
func (m *Manager) Exec(ctx context.Context, ref string, p spec.Process) (Session, error) {
	s, err := m.exec(ctx, ref, p, nil)
	if err != nil {
		return nil, err
	}
	return s, nil
}

func (m *Manager) exec(ctx context.Context, ref string, p spec.Process, pipes *OutputPipes) (*execSession, error) {
	e, err := m.find(ref)
	if err != nil {
		return nil, err
	}
	r, err := e.running()
	if err != nil {
		return nil, err
	}
	config, err := m.effective(e)
	if err != nil {
		return nil, err
	}
	process, err := oci.ExecProcess(config.Process, p)
	if err != nil {
		return nil, err
	}
	id, err := newID()
	if err != nil {
		return nil, err
	}
	if pipes != nil && p.Terminal {
		return nil, spec.Invalidf("start.output_pipes", "a terminal's output does not come through pipes")
	}
	proc, handed, err := r.startExec(ctx, "exec-"+id, process, p.Stdin, pipes)
	if err != nil {
		return nil, e.sessionError(err)
	}
	fault.At("exec", "process started")
	s := newExecSession(e, r, proc, p.Command[0])
	s.stdin.synced = true
	s.pipes, s.handed = pipes, handed
	if err := s.preparePipes(); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	e.announce(EventExecStarted, map[string]string{"command": s.command})
	return s, nil
}

// execSession is a process that lives as long as its session.
type execSession struct {
	e       *entry
	r       *run
	proc    *agent.Process
	command string
	stdin   stdin
	exited  bool
	linger  time.Duration
	// Where the caller reads the output, nil for from Output; and whether the process writes there itself.
	pipes  *OutputPipes
	handed bool
	// running ends with the process.
	running context.Context
	ends    context.CancelFunc
}

func (s *execSession) PID() int { return s.proc.PID }

// preparePipes: the process has its own by now, and the output ends with that.
func (s *execSession) preparePipes() error {
	switch {
	case s.pipes == nil:
		return nil
	case s.handed:
		s.pipes.Close()
		return nil
	}
	return s.pipes.reopen()
}

func (s *execSession) Output(ctx context.Context, fn func(Stream, []byte) error) error {
	switch {
	case s.handed:
		return nil
	case s.pipes != nil:
		defer s.pipes.Close()
		fn = func(stream Stream, data []byte) error { return s.pipes.fill(ctx, stream, data) }
	}
	return s.eachPiece(ctx, fn)
}

func (s *execSession) eachPiece(ctx context.Context, fn func(Stream, []byte) error) error {
	ctx, cancel := context.WithCancel(ctx)
	// One piece ahead of fn: the agent reads from the process, and sends, while the caller is sent what came before. That
	// acknowledges what fn has not had yet, but nobody asks for it again: a session does not outlive its caller.
	next := s.readAhead(ctx, 0)
	defer func() {
		cancel()
		<-next // closed, or about to be
	}()
	for offset := uint64(0); ; {
		got := <-next
		if got.err != nil {
			if _, gone := s.ended(ctx, got.err); gone {
				return nil
			}
			return got.err
		}
		for _, c := range got.chunks {
			offset += uint64(len(c.Data))
		}
		if !got.eof {
			next = s.readAhead(ctx, offset)
		}
		for _, c := range got.chunks {
			if err := fn(Stream(c.Stream), c.Data); err != nil {
				return err
			}
		}
		if got.eof {
			return nil
		}
	}
}

// piece is what one read of output answered with.
type piece struct {
	chunks []agent.Chunk
	eof    bool
	err    error
}

// readAhead reads in the background; the result comes once, and then the channel is closed.
func (s *execSession) readAhead(ctx context.Context, offset uint64) <-chan piece {
	next := make(chan piece, 1)
	go func() { // Output waits for it
		defer close(next)
		var p piece
		p.chunks, p.eof, p.err = s.read(ctx, offset)
		next <- p
	}()
	return next
}

func (s *execSession) Write(ctx context.Context, p []byte) error {
	return s.stdin.write(ctx, s.proc, p, false)
}

func (s *execSession) CloseStdin(ctx context.Context) error {
	return s.stdin.write(ctx, s.proc, nil, true)
}

func (s *execSession) Resize(ctx context.Context, size spec.TerminalSize) error {
	return s.proc.Resize(ctx, size)
}

func (s *execSession) Signal(ctx context.Context, signal string) error {
	sig, err := parseSignal(signal)
	if err != nil {
		return err
	}
	return s.proc.Signal(ctx, sig, false)
}

func (s *execSession) Wait(ctx context.Context) (spec.Exit, error) {
	exit, err := s.proc.Wait(ctx)
	if err != nil {
		gone := false
		if exit, gone = s.ended(ctx, err); !gone {
			return spec.Exit{}, err
		}
	}
	s.exited = true
	fault.At("exec", "ended")
	s.ends()
	s.e.announce(EventExecExited, map[string]string{"command": s.command, "exit_code": strconv.Itoa(exit.Code)})
	return exit, nil
}

// ended reports how the process ended when asking for it failed because its sandbox has gone: nothing outlives that.
func (s *execSession) ended(ctx context.Context, err error) (spec.Exit, bool) {
	if ctx.Err() != nil {
		return spec.Exit{}, false
	}
	select {
	case <-s.r.inst.Done():
		return spec.Exit{Code: 128 + int(syscall.SIGKILL), Signal: int(syscall.SIGKILL), Time: time.Now()}, true
	default:
		return spec.Exit{}, false
	}
}

// sessionCloseLimit bounds the farewell to an exec'd process.
const sessionCloseLimit = 10 * time.Second

func (s *execSession) Close() error {
	if s.pipes != nil {
		s.pipes.Close()
	}
	ctx, cancel := context.WithTimeout(s.e.m.ctx, sessionCloseLimit)
	defer cancel()
	s.ends()
	if !s.exited {
		// That it has ended meanwhile is no reason not to forget it.
		if err := s.closeError(s.proc.Signal(ctx, int(syscall.SIGKILL), false)); err != nil {
			return err
		}
		if _, err := s.proc.Wait(ctx); err != nil {
			return s.closeError(err)
		}
	}
	err := s.closeError(s.proc.Release(ctx))
	fault.At("exec", "released")
	return err
}

// closeError drops errors that mean the sandbox has gone, and the process with it.
func (s *execSession) closeError(err error) error {
	if err == nil || spec.KindOf(err) == spec.KindWrongState || spec.KindOf(err) == spec.KindNotFound {
		return nil
	}
	return err
}

// sessionError says which workload an agent's refusal is about.
func (e *entry) sessionError(err error) error {
	rec, _, _ := e.peek()
	if spec.KindOf(err) == spec.KindWrongState && rec.Status.State != StateRunning {
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.wrongStateLocked("running")
	}
	return err
}
