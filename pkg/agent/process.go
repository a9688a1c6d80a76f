package agent

import (
	"context"
	"time"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Process is a process in a sandbox. Its methods may be called from many goroutines.
type Process struct {
	ID string
	// In the sandbox's pid namespace; 0 for one that was not started by this client.
	PID int

	client *Client
	early  *early // nil but for one that was launched
}

// Chunk is a piece of output.
type Chunk struct {
	Stream uint8 // 1 standard output, 2 standard error
	Time   time.Time
	Data   []byte
}

// ReadOutput answers with what the process wrote from offset on, counted over both streams, waiting until there is
// something or the output has ended. offset acknowledges everything before it: the agent forgets that, and a process whose
// output is not acknowledged waits once 1 MiB has come together.
func (p *Process) ReadOutput(ctx context.Context, offset uint64) ([]Chunk, bool, error) {
	if chunks, eof, ok, err := p.early.first(ctx, offset); ok {
		return chunks, eof, err
	}
	var chunks []Chunk
	var eof bool
	err := p.client.poll(ctx, func(ctx context.Context, agent agentv1.AgentServiceService) (bool, error) {
		r, err := agent.ReadOutput(ctx, &agentv1.ReadOutputRequest{
			ProcessId: p.ID, Offset: offset, MaxBytes: readBytes, WaitMs: uint32(pollTime.Milliseconds()),
		})
		if err != nil {
			return false, err
		}
		chunks, eof, err = chunksOf(r, readBytes)
		return eof || len(chunks) > 0, err
	})
	if err != nil {
		return nil, false, err
	}
	return chunks, eof, nil
}

// inputWait is how long an agent waits for a process to read, before it answers that not all input was accepted: a second
// less than it promises, because a clock is read on either side.
const inputWait = 9 * time.Second

// WriteInput hands data to the process's standard input, which already has offset bytes, and closes it after them if eof
// says so. It waits until some is accepted, the process takes no more (closed), or ctx is done. accepted counts from the
// first byte ever written, so a call without data tells where a predecessor stopped; it can be less than
// offset+len(data): go on from there. However often it is called, an agent that takes nothing, or little, can't make that a
// busy loop.
func (p *Process) WriteInput(ctx context.Context, offset uint64, data []byte, eof bool) (accepted uint64, closed bool, err error) {
	hasty := haste{wait: inputWait}
	for {
		piece := data[:min(len(data), maxCallBytes)]
		end := offset + uint64(len(piece))
		hasty.begin()
		accepted, closed, err = p.writePiece(ctx, offset, piece, eof && len(piece) == len(data))
		switch {
		case err != nil || closed:
			return accepted, closed, err
		case accepted < end:
			if err := hasty.pause(ctx); accepted > offset || err != nil {
				if accepted > offset {
					err = nil // what was accepted must be told
				}
				return accepted, false, err
			}
		case len(piece) == len(data):
			return accepted, false, nil
		default:
			data, offset = data[len(piece):], end
		}
	}
}

func (p *Process) writePiece(ctx context.Context, offset uint64, data []byte, eof bool) (accepted uint64, closed bool, err error) {
	err = p.client.call(ctx, pollTime+pollMargin, func(ctx context.Context, agent agentv1.AgentServiceService) error {
		r, err := agent.WriteInput(ctx, &agentv1.WriteInputRequest{ProcessId: p.ID, Offset: offset, Data: data, Eof: eof})
		if err != nil {
			return err
		}
		if r.Accepted < offset && !r.Closed {
			return protocolError("%d bytes of input accepted after %d", r.Accepted, offset)
		}
		accepted, closed = r.Accepted, r.Closed
		return nil
	})
	return accepted, closed, err
}

// Resize sets the size of the process's terminal.
func (p *Process) Resize(ctx context.Context, size spec.TerminalSize) error {
	return p.client.call(ctx, callLimit, func(ctx context.Context, agent agentv1.AgentServiceService) error {
		_, err := agent.Resize(ctx, &agentv1.ResizeRequest{ProcessId: p.ID, Rows: uint32(size.Rows), Columns: uint32(size.Columns)})
		return err
	})
}

// Signal sends a signal to the process, or with all to every process of its container. KindWrongState once it has ended.
func (p *Process) Signal(ctx context.Context, sig int, all bool) error {
	return p.client.call(ctx, callLimit, func(ctx context.Context, agent agentv1.AgentServiceService) error {
		_, err := agent.Signal(ctx, &agentv1.SignalRequest{ProcessId: p.ID, Signal: int32(sig), All: all})
		return err
	})
}

// Wait answers when the process has ended. Its descendants may still hold its output open.
func (p *Process) Wait(ctx context.Context) (spec.Exit, error) {
	if exit, ok, err := p.early.wait(ctx); ok {
		return exit, err
	}
	exit, _, err := p.wait(ctx)
	return exit, err
}

// wait also tells what a copy complained about.
func (p *Process) wait(ctx context.Context) (spec.Exit, string, error) {
	var exit spec.Exit
	var complaint string
	err := p.client.poll(ctx, func(ctx context.Context, agent agentv1.AgentServiceService) (bool, error) {
		r, err := agent.Wait(ctx, &agentv1.WaitRequest{ProcessId: p.ID, WaitMs: uint32(pollTime.Milliseconds())})
		if err != nil || !r.Exited {
			return false, err
		}
		exit, err = exitOf(r)
		complaint = text(r.Error, maxMessage)
		return true, err
	})
	return exit, complaint, err
}

// Release forgets an ended process, unread output included. Releasing twice is fine.
func (p *Process) Release(ctx context.Context) error {
	err := p.client.call(ctx, callLimit, func(ctx context.Context, agent agentv1.AgentServiceService) error {
		_, err := agent.Release(ctx, &agentv1.ReleaseRequest{ProcessId: p.ID})
		return err
	})
	if spec.KindOf(err) == spec.KindNotFound {
		return nil
	}
	return err
}
