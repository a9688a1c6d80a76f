package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// Stdio is what a process's streams are connected to on this side. A nil Stdin sends nothing; nil writers discard.
//
// Stdin is read by a goroutine of its own, which ends with the first read that returns after the process has ended: a
// reader that blocks for ever, such as a terminal nobody types at, keeps that goroutine.
type Stdio struct {
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
}

// Process is a process in a sandbox, exec'd or attached to.
type Process struct {
	// Pid in the sandbox's pid namespace; 0 for an attachment.
	Pid int32

	cancel context.CancelFunc
	conv   conversation
	// One slot: whoever holds it may send. A channel, because waiting for it must end when the process has ended.
	sending chan struct{}
	done    chan struct{}

	// Set before done is closed.
	exit *sandboxdv1.ProcessExit
	err  error
}

// conversation hides the only difference between Exec and Attach: the types of their messages.
type conversation interface {
	// recv answers with one of: output on one of the two streams, or the exit.
	recv() (stdout, stderr []byte, exit *sandboxdv1.ProcessExit, err error)
	stdin(data []byte) error
	closeStdin() error
	resize(size *sandboxdv1.TerminalSize) error
	signal(name string) error
}

// Exec starts a further process in a running workload and connects its streams. start.Stdin is set if io has a Stdin.
// The process ends when ctx is done.
func (c *Client) Exec(ctx context.Context, start *sandboxdv1.ExecStart, stdio Stdio) (*Process, error) {
	if stdio.Stdin != nil {
		start.Stdin = true
	}
	ctx, cancel := context.WithCancel(ctx)
	pipes := c.pipesFor(ctx, start, stdio)
	stream, err := c.Workloads.Exec(ctx)
	if err != nil {
		cancel()
		pipes.drop()
		return nil, err
	}
	// An error of Send is told by Recv.
	_ = stream.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Start{Start: start}})
	if pipes != nil {
		start.OutputPipes = nil // they are for this once
	}
	first, err := stream.Recv()
	if err != nil {
		cancel()
		pipes.drop()
		return nil, noEOF(err)
	}
	return newProcess(ctx, cancel, execConversation{stream}, first.GetStarted().GetPid(), stdio, pipes), nil
}

// pipesFor asks for pipes, and names them in start, for output that goes to a file of this program's (and so to a pipe or a
// terminal): what is collected in memory is not much, and does without.
func (c *Client) pipesFor(ctx context.Context, start *sandboxdv1.ExecStart, stdio Stdio) *pipes {
	if _, ok := stdio.Stdout.(*os.File); !ok || start.GetTerminal() || len(start.GetOutputPipes()) > 0 {
		return nil
	}
	c.conn.Connect() // meanwhile
	p := askForPipes(ctx, c.socket)
	if p != nil {
		start.OutputPipes = p.name
	}
	return p
}

// Attach connects to the workload's own process, also before it is started; it returns when the attachment stands. When
// ctx is done the attachment ends and the process goes on.
func (c *Client) Attach(ctx context.Context, start *sandboxdv1.AttachStart, stdio Stdio) (*Process, error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := c.Workloads.Attach(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	_ = stream.Send(&sandboxdv1.AttachRequest{Request: &sandboxdv1.AttachRequest_Start{Start: start}})
	if _, err := stream.Recv(); err != nil {
		cancel()
		return nil, noEOF(err)
	}
	return newProcess(ctx, cancel, attachConversation{stream}, 0, stdio, nil), nil
}

// newProcess follows a process whose output comes through pipes, unless they are nil.
func newProcess(ctx context.Context, cancel context.CancelFunc, conv conversation, pid int32, stdio Stdio, pipes *pipes) *Process {
	p := &Process{
		Pid: pid, cancel: cancel, conv: conv,
		sending: make(chan struct{}, 1), done: make(chan struct{}),
	}
	if stdio.Stdin != nil {
		go p.copyIn(stdio.Stdin)
	}
	go func() {
		defer close(p.done)
		defer cancel()
		stdout, stderr := orDiscard(stdio.Stdout), orDiscard(stdio.Stderr)
		if pipes == nil {
			p.exit, p.err = p.copyOut(stdout, stderr)
		} else {
			p.exit, p.err = p.carryOut(ctx, pipes, stdout, stderr)
		}
	}()
	return p
}

func orDiscard(w io.Writer) io.Writer {
	if w == nil {
		return io.Discard
	}
	return w
}

// noEOF: a stream that ends where an answer was due is a fault of the daemon, not an end.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("cannot follow the process: the daemon ended the call too early: %w", io.ErrUnexpectedEOF)
	}
	return err
}

// copyOut writes output as it comes, and so holds the process back when a writer is slow, until the exit.
func (p *Process) copyOut(stdout, stderr io.Writer) (*sandboxdv1.ProcessExit, error) {
	for {
		out, errOut, exit, err := p.conv.recv()
		if err != nil {
			return nil, noEOF(err)
		}
		if exit != nil {
			return exit, nil
		}
		if len(out) > 0 {
			if _, err := stdout.Write(out); err != nil {
				return nil, fmt.Errorf("cannot write the process's output: %w", err)
			}
		}
		if len(errOut) > 0 {
			if _, err := stderr.Write(errOut); err != nil {
				return nil, fmt.Errorf("cannot write the process's error output: %w", err)
			}
		}
	}
}

// carryOut is copyOut where output comes through pipes.
func (p *Process) carryOut(ctx context.Context, pipes *pipes, stdout, stderr io.Writer) (*sandboxdv1.ProcessExit, error) {
	defer context.AfterFunc(ctx, pipes.close)()
	pipes.carry(stdout, stderr, p.cancel)
	exit, err := p.copyOut(stdout, stderr)
	var carryErr error
	if err == nil {
		carryErr = pipes.finish()
	} else {
		carryErr = pipes.giveUp()
	}
	if carryErr != nil {
		return nil, fmt.Errorf("cannot write the process's output: %w", carryErr)
	}
	if err == nil {
		err = ctx.Err() // then not all of it may have come
	}
	if err != nil {
		return nil, err
	}
	return exit, nil
}

func (p *Process) copyIn(stdin io.Reader) {
	buf := make([]byte, pieceBytes)
	for {
		n, err := stdin.Read(buf)
		if n > 0 && p.send(func() error { return p.conv.stdin(buf[:n]) }) != nil {
			return
		}
		if err != nil {
			// Whether it is the end or a failure, nothing more will come. The stream itself stays open for signals.
			_ = p.send(p.conv.closeStdin)
			return
		}
	}
}

// send sends one message in its turn. It gives up when the process has ended.
func (p *Process) send(message func() error) error {
	select {
	case p.sending <- struct{}{}:
		defer func() { <-p.sending }()
		return message()
	case <-p.done:
		return io.ErrClosedPipe
	}
}

// sendWithin is send that its caller does not wait for beyond ctx: the message is then sent when its turn comes, if it
// does. A turn, once taken, lasts until the daemon takes the message, and that it may hold back. The goroutine ends at the
// latest with the stream.
func (p *Process) sendWithin(ctx context.Context, message func() error) error {
	sent := make(chan error, 1)
	go func() { sent <- p.send(message) }()
	select {
	case err := <-sent:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Resize tells the process's terminal its size.
func (p *Process) Resize(ctx context.Context, rows, columns uint32) error {
	return p.sendWithin(ctx, func() error {
		return p.conv.resize(&sandboxdv1.TerminalSize{Rows: rows, Columns: columns})
	})
}

// Signal sends a signal, by name or number. It comes after what was sent before: while a process does not read its input
// it waits, until ctx is done. A workload's own process can be signalled past that with KillWorkload.
func (p *Process) Signal(ctx context.Context, name string) error {
	return p.sendWithin(ctx, func() error { return p.conv.signal(name) })
}

// Wait answers when the process has ended and its output is written, or why it can no longer be followed.
func (p *Process) Wait() (*sandboxdv1.ProcessExit, error) {
	<-p.done
	return p.exit, p.err
}

// Done is closed when Wait would not block.
func (p *Process) Done() <-chan struct{} { return p.done }

// Close lets go: an exec'd process that still runs is ended, an attachment leaves its process alone.
func (p *Process) Close() {
	p.cancel()
	<-p.done
}
