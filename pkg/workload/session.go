package workload

import (
	"context"
	"io"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Session is a caller's connection to a process. Output is called by one goroutine, Write and CloseStdin by one; the
// rest by any.
type Session interface {
	// PID in the sandbox's pid namespace; 0 for an attachment.
	PID() int
	// Output calls fn with each piece in order until the process's output ends (nil), fn fails, or ctx is done. Once Wait
	// has answered it also ends when the process's descendants, who may hold it open, have been silent for a while.
	Output(ctx context.Context, fn func(stream Stream, data []byte) error) error
	// Write returns once the bytes are accepted by the process; io.ErrClosedPipe once it takes no more.
	Write(ctx context.Context, p []byte) error
	CloseStdin(ctx context.Context) error
	Resize(ctx context.Context, size spec.TerminalSize) error
	Signal(ctx context.Context, signal string) error
	Wait(ctx context.Context) (spec.Exit, error)
	// Close ends the session: an exec'd process that still runs is killed and forgotten, an attachment leaves its process alone.
	Close() error
}

// Stream is which of a process's output streams.
type Stream uint8

const (
	Stdout Stream = 1
	Stderr Stream = 2
)

// stdin is the standard input of one process, written by one at a time.
type stdin struct {
	offset uint64
	// Whether offset is what the agent has: not so after a restart of the daemon.
	synced bool
	closed bool
}

// maxInput bounds one piece of input to the agent.
const maxInput = 256 << 10

// write hands p to the process and returns when it has it all.
func (s *stdin) write(ctx context.Context, proc *agent.Process, p []byte, eof bool) error {
	if !s.synced {
		accepted, closed, err := proc.WriteInput(ctx, 0, nil, false)
		if err != nil {
			return err
		}
		s.offset, s.closed, s.synced = accepted, closed, true
	}
	for {
		if s.closed {
			if eof && len(p) == 0 {
				return nil
			}
			return io.ErrClosedPipe
		}
		piece := p[:min(len(p), maxInput)]
		last := len(piece) == len(p)
		accepted, closed, err := proc.WriteInput(ctx, s.offset, piece, eof && last)
		if err != nil {
			s.synced = false // some of it may have been accepted
			return err
		}
		accepted = min(max(accepted, s.offset), s.offset+uint64(len(piece)))
		n := int(accepted - s.offset)
		s.offset = accepted
		s.closed = closed || eof && last && n == len(piece)
		p = p[n:]
		if len(p) == 0 && (!eof || s.closed) {
			return nil
		}
	}
}
