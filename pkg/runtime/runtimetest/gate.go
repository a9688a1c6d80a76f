package runtimetest

import (
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// gate holds up whoever passes while it is shut.
type gate struct {
	mu   sync.Mutex // guards way
	way  chan struct{}
	free bool
}

func newGate() *gate {
	g := &gate{way: make(chan struct{}), free: true}
	close(g.way)
	return g
}

func (g *gate) shut() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.free {
		g.way, g.free = make(chan struct{}), false
	}
}

func (g *gate) open() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.free {
		close(g.way)
		g.free = true
	}
}

// pass waits until the gate is open, the connection is closed, or late says that it took too long.
func (g *gate) pass(closed <-chan struct{}, late <-chan time.Time) error {
	g.mu.Lock()
	way := g.way
	g.mu.Unlock()
	select {
	case <-way:
		return nil
	case <-closed:
		return net.ErrClosed
	case <-late:
		return os.ErrDeadlineExceeded
	}
}

// gatedConn is a connection through a gate.
type gatedConn struct {
	net.Conn
	gate   *gate
	once   sync.Once
	closed chan struct{}
	// For writes, as nanoseconds since 1970; 0 for none.
	deadline atomic.Int64
}

// SetWriteDeadline implements net.Conn. It holds at the gate, too.
func (c *gatedConn) SetWriteDeadline(t time.Time) error {
	c.deadline.Store(0)
	if !t.IsZero() {
		c.deadline.Store(t.UnixNano())
	}
	return c.Conn.SetWriteDeadline(t)
}

// passToWrite waits at the gate for as long as a write may take.
func (c *gatedConn) passToWrite() error {
	var late <-chan time.Time
	if at := c.deadline.Load(); at != 0 {
		timer := time.NewTimer(time.Until(time.Unix(0, at)))
		defer timer.Stop()
		late = timer.C
	}
	return c.gate.pass(c.closed, late)
}

func (c *gatedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if passErr := c.gate.pass(c.closed, nil); passErr != nil {
		return 0, passErr
	}
	return n, err
}

func (c *gatedConn) Write(p []byte) (int, error) {
	if err := c.passToWrite(); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// WriteMsgUnix is of a *net.UnixConn, over which descriptors go.
func (c *gatedConn) WriteMsgUnix(b, oob []byte, addr *net.UnixAddr) (n, oobn int, err error) {
	if err := c.passToWrite(); err != nil {
		return 0, 0, err
	}
	return c.Conn.(*net.UnixConn).WriteMsgUnix(b, oob, addr) //nolint:forcetypeassert // connOf makes no other
}

func (c *gatedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
