// Package agent is the daemon's end of the agent protocol, shaped like os/exec: a Client for a sandbox, a Process for each
// process in it.
//
// Everything an agent answers is presumed hostile: it is bounded and made harmless here, before any caller sees it
// (claims.go), and it names nothing on the host. What is left is a claim all the same.
package agent

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"

	"github.com/containerd/log"
	"github.com/containerd/ttrpc"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// callLimit bounds one attempt of a call that is not a wait. Starting a process or creating a container takes
	// milliseconds, but seconds in an emulated guest on a busy host.
	callLimit = 2 * time.Minute
	// pollTime is how long the agent may sit on a call that waits for something. Short enough that a connection that died
	// without a word is found out.
	pollTime = 30 * time.Second
	// pollMargin is how much later than pollTime the answer may come before the connection is given up.
	pollMargin = 15 * time.Second
	// dialLimit bounds one attempt to connect.
	dialLimit = 10 * time.Second
	// reconnectLimit is how long an agent whose sandbox is there may stay out of reach before a call fails.
	reconnectLimit = 60 * time.Second
	// Delays between attempts to reach an agent.
	firstRetry = 5 * time.Millisecond
	lastRetry  = 500 * time.Millisecond
)

// errNotRunning: the sandbox has ended.
var errNotRunning = spec.Errorf(spec.KindWrongState, "sandbox is not running")

// ttrpc logs, on the standard logger, each answer that nobody waits for any more. Those are everyday here (every cancelled
// call leaves one), and a hostile agent can send any number.
func init() { _ = log.SetLevel("panic") }

// Client calls the agent of one sandbox. Its methods may be called at once from many goroutines. A lost connection is
// dialled again and the call repeated: the protocol is made so that repeating changes nothing.
type Client struct {
	dial func(context.Context) (net.Conn, error)
	done <-chan struct{}

	// ctx ends when the client is closed or the sandbox is gone.
	ctx    context.Context
	cancel context.CancelFunc
	owned  sync.WaitGroup

	dialling chan struct{} // holds one token: who has it dials
	mu       sync.Mutex
	conn     *connection // nil when there is none
	// Closed while the agent can answer; calls wait for it.
	awake chan struct{}
	// Of the process that is being launched.
	expected *early
}

// connection is one connection to the agent.
type connection struct {
	*ttrpc.Client
	raw *conn
}

// New makes a client that reaches its agent by dial until done is closed. It dials at the first call.
func New(dial func(context.Context) (net.Conn, error), done <-chan struct{}) *Client {
	ctx, cancel := context.WithCancel(context.Background())
	c := &Client{dial: dial, done: done, ctx: ctx, cancel: cancel, dialling: make(chan struct{}, 1), awake: make(chan struct{})}
	close(c.awake)
	c.owned.Go(func() {
		select {
		case <-done:
			c.cancel()
		case <-ctx.Done():
		}
		c.drop(nil)
	})
	return c
}

// Close ends the connection and every call under way. The sandbox goes on.
func (c *Client) Close() {
	c.cancel()
	c.owned.Wait()
}

// drop closes the connection if it is still that one; nil means whichever it is.
func (c *Client) drop(which *connection) {
	c.mu.Lock()
	conn := c.conn
	if which != nil && conn != which {
		conn = nil
	} else {
		c.conn = nil
	}
	c.mu.Unlock()
	if conn != nil {
		conn.Close()
	}
}

func (c *Client) current() *connection {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.conn
}

// gone is what a call answers after the client's end.
func (c *Client) gone() error {
	select {
	case <-c.done:
		return errNotRunning
	default:
	}
	if c.ctx.Err() != nil {
		return spec.Errorf(spec.KindUnavailable, "the connection to the sandbox was closed: try again")
	}
	return nil
}

// connect answers with the connection, dialling it if there is none.
func (c *Client) connect(ctx context.Context) (*connection, error) {
	select {
	case c.dialling <- struct{}{}:
		defer func() { <-c.dialling }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if conn := c.current(); conn != nil {
		return conn, nil
	}
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	raw, err := c.dial(ctx)
	if err != nil {
		return nil, err
	}
	checked := newConn(raw)
	conn := &connection{ttrpc.NewClient(checked), checked}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ctx.Err() != nil {
		conn.Close()
		return nil, ttrpc.ErrClosed
	}
	c.conn = conn
	return conn, nil
}

// call runs attempt until it gets an answer, a refusal included. limit bounds each attempt. The error is a spec.Error, or
// ctx's.
func (c *Client) call(ctx context.Context, limit time.Duration, attempt func(context.Context, agentv1.AgentServiceService) error) error {
	if gone := c.gone(); gone != nil {
		return gone
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(c.ctx, cancel)
	defer stop()

	var unreachable time.Time // since when
	for delay := firstRetry; ; delay = min(2*delay, lastRetry) {
		awake, err := c.awaitAwake(ctx)
		if err != nil {
			if gone := c.gone(); gone != nil {
				return gone
			}
			return err
		}
		conn, err := c.connect(ctx)
		if err == nil {
			err = c.attempt(ctx, conn, limit, attempt)
			if err == nil {
				return nil
			}
			if violation := conn.raw.violation(); violation != nil {
				c.drop(conn)
				return violation
			}
			if refusal := refused(err); refusal != nil {
				return refusal
			}
			if ctx.Err() == nil {
				c.drop(conn) // lost, or silent for longer than limit
			}
		}
		if gone := c.gone(); gone != nil {
			return gone
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if spec.KindOf(err) == spec.KindWrongState {
			return err // the instance says that it has ended
		}
		if !c.awakeSince(awake) {
			unreachable = time.Time{} // it could not have answered
		} else if unreachable.IsZero() {
			unreachable = time.Now()
		} else if time.Since(unreachable) > reconnectLimit {
			return spec.Errorf(spec.KindUnavailable, "cannot reach the sandbox's agent for %v: %w", reconnectLimit, err)
		}
		select {
		case <-time.After(delay):
		case <-ctx.Done():
		}
	}
}

func (c *Client) attempt(ctx context.Context, conn *connection, limit time.Duration, attempt func(context.Context, agentv1.AgentServiceService) error) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	return attempt(ctx, agentv1.NewAgentServiceClient(conn.Client))
}

// poll is call for what waits at the agent, repeated until attempt has something.
func (c *Client) poll(ctx context.Context, attempt func(context.Context, agentv1.AgentServiceService) (bool, error)) error {
	hasty := haste{wait: pollTime}
	for {
		has := false
		hasty.begin()
		err := c.call(ctx, pollTime+pollMargin, func(ctx context.Context, agent agentv1.AgentServiceService) (err error) {
			has, err = attempt(ctx, agent)
			return err
		})
		if err != nil || has {
			return err
		}
		if err := hasty.pause(ctx); err != nil {
			return err
		}
	}
}

// haste keeps an agent that answers at once, where it should have waited, from keeping the daemon busy.
type haste struct {
	wait  time.Duration // what the agent waits before it answers that there is nothing
	began time.Time
	delay time.Duration
}

// begin is called before each call.
func (h *haste) begin() { h.began = time.Now() }

// pause is called after an answer that says that there is nothing.
func (h *haste) pause(ctx context.Context) error {
	if time.Since(h.began) >= h.wait {
		h.delay = 0
		return ctx.Err()
	}
	h.delay = min(max(firstRetry, 2*h.delay), lastRetry)
	select {
	case <-time.After(h.delay):
		return ctx.Err()
	case <-ctx.Done():
		return ctx.Err()
	}
}

// isContext reports whether err is a context's end.
func isContext(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}
