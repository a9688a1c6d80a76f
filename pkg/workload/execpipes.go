package workload

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// OutputPipes are the write ends of two pipes from which a caller reads what a process writes.
type OutputPipes struct{ Stdout, Stderr *os.File }

// Close may be called more than once.
func (p *OutputPipes) Close() {
	p.Stdout.Close()
	p.Stderr.Close()
}

// ExecInto is Exec for a caller who reads the output from pipes; it takes them over, also when it fails. Where the sandbox
// runs on this host's kernel the process itself gets them, and its output passes through neither agent nor daemon;
// elsewhere the session's Output fills them. Either way nothing is kept of an exec's output but what the pipes hold.
func (m *Manager) ExecInto(ctx context.Context, ref string, p spec.Process, pipes *OutputPipes) (Session, error) {
	s, err := m.exec(ctx, ref, p, pipes)
	if err != nil {
		pipes.Close()
		return nil, err
	}
	return s, nil
}

// startExec starts a process. handed says that it has the pipes, of which there may be none.
func (r *run) startExec(ctx context.Context, id string, p *specs.Process, stdin bool, pipes *OutputPipes) (proc *agent.Process, handed bool, err error) {
	adopter, shares := r.inst.(runtime.Adopter)
	if pipes == nil || !shares {
		proc, err = r.client.Start(ctx, containerID, id, p, stdin)
		return proc, false, err
	}
	output := [spec.HandoverDescriptors]*os.File{pipes.Stdout, pipes.Stderr}
	for _, f := range output {
		if err := adopter.Adopt(f); err != nil {
			return nil, false, err
		}
	}
	return r.client.StartInto(ctx, containerID, id, p, stdin, output)
}

// ownEnd is a pipe's write end with a file description of its own, which no sandbox shares, and so nobody else makes block.
func ownEnd(f *os.File) (*os.File, error) {
	defer f.Close()
	own, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()), os.O_WRONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the caller's pipe: %w", err)
	}
	return own, nil
}

// reopen makes the pipes ready for fill.
func (p *OutputPipes) reopen() (err error) {
	for _, f := range []**os.File{&p.Stdout, &p.Stderr} {
		own, err := ownEnd(*f)
		if err != nil {
			return err
		}
		*f = own
	}
	return nil
}

// fill writes one piece of output; it waits for the reader until ctx is done.
func (p *OutputPipes) fill(ctx context.Context, stream Stream, data []byte) error {
	f := p.Stdout
	if stream == Stderr {
		f = p.Stderr
	}
	stop := context.AfterFunc(ctx, func() { _ = f.SetWriteDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := f.Write(data); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if errors.Is(err, unix.EPIPE) {
			return spec.Errorf(spec.KindWrongState, "the caller closed the pipe that the process's output goes to")
		}
		return fmt.Errorf("cannot pass output on: %w", err)
	}
	return nil
}
