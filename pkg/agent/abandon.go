package agent

import (
	"context"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// endLimit bounds the clearing up after a copy, for which its caller waits.
	endLimit = 10 * time.Second
	// abandonLimit bounds the clearing up after a start without an answer, for which nobody waits: as long as a start may
	// take. What an agent out of reach still has after that goes when the daemon comes back to it (Retain), or with the
	// sandbox.
	abandonLimit = callLimit
)

// abandon ends, in the background, what a call may have started whose answer never came.
func (c *Client) abandon(p *Process) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		return // Close may be done with waiting
	}
	c.owned.Go(func() {
		ctx, cancel := context.WithTimeout(c.ctx, abandonLimit)
		defer cancel()
		p.kill(ctx)
	})
}

// end ends a copy and has it forgotten, also when ctx is why.
func (p *Process) end(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), endLimit)
	defer cancel()
	p.kill(ctx)
}

// kill ends a process, if it has not ended, and has it forgotten. An agent that does not know it will not start it any more.
func (p *Process) kill(ctx context.Context) {
	// An error of any of these means that it has ended, or that the sandbox has.
	if p.Release(ctx) == nil {
		return
	}
	_ = p.Signal(ctx, int(unix.SIGKILL), false)
	if _, err := p.Wait(ctx); err == nil {
		_ = p.Release(ctx)
	}
}
