package agent

import (
	"context"
	"sync"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// early are the questions that are asked of every launched process, asked before the agent serves: they wait where it will find
// them, so that what a short process did is known as soon as the agent knows. An answer that is an error is none: the question is
// asked again.
type early struct {
	end    chan struct{} // closed when exit and endErr are there
	exit   spec.Exit
	endErr error

	output    chan struct{} // closed when the rest is there
	chunks    []Chunk
	eof       bool
	outputErr error
	read      sync.Once
}

// Expect is for a process that is being launched (Launch): it asks for its end and its output. The agent's socket must take
// connections. Close ends that too.
func (c *Client) Expect(processID string) {
	e := &early{end: make(chan struct{}), output: make(chan struct{})}
	p := c.Process(processID)
	c.owned.Go(func() {
		defer close(e.end)
		e.exit, e.endErr = p.Wait(c.ctx)
	})
	c.owned.Go(func() {
		defer close(e.output)
		e.chunks, e.eof, e.outputErr = p.ReadOutput(c.ctx, 0)
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	c.expected = e
}

// takeExpected answers with what was asked of the process that is launched, once.
func (c *Client) takeExpected() *early {
	c.mu.Lock()
	defer c.mu.Unlock()
	e := c.expected
	c.expected = nil
	return e
}

// wait answers false if the question must be asked again.
func (e *early) wait(ctx context.Context) (exit spec.Exit, ok bool, err error) {
	if e == nil {
		return spec.Exit{}, false, nil
	}
	select {
	case <-e.end:
		return e.exit, e.endErr == nil, nil
	case <-ctx.Done():
		return spec.Exit{}, true, ctx.Err()
	}
}

// first is wait for the output's beginning, which is answered once.
func (e *early) first(ctx context.Context, offset uint64) (chunks []Chunk, eof, ok bool, err error) {
	if e == nil || offset != 0 {
		return nil, false, false, nil
	}
	select {
	case <-e.output:
	case <-ctx.Done():
		return nil, false, true, ctx.Err()
	}
	e.read.Do(func() { chunks, eof, ok = e.chunks, e.eof, e.outputErr == nil })
	e.chunks = nil
	return chunks, eof, ok, nil
}
