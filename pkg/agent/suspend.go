package agent

import "context"

// Suspend says that the agent is being made to stand still: it will answer nothing, and that is no fault of its. Calls wait,
// for as long as their callers like, until Resume; those under way too, once their time is up. Idempotent.
func (c *Client) Suspend() {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.awake:
		c.awake = make(chan struct{})
	default:
	}
}

// Resume says that the agent goes on. Idempotent.
func (c *Client) Resume() {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-c.awake:
	default:
		close(c.awake)
	}
}

// awaitAwake waits while the agent is suspended. What it answers with tells awakeSince since when it has not been.
func (c *Client) awaitAwake(ctx context.Context) (chan struct{}, error) {
	for {
		c.mu.Lock()
		awake := c.awake
		c.mu.Unlock()
		select {
		case <-awake:
			return awake, nil
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// awakeSince reports whether the agent has not been suspended since awaitAwake answered with awake.
func (c *Client) awakeSince(awake chan struct{}) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.awake == awake
}
