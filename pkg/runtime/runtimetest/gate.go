package runtimetest

import (
	"net"
	"sync"
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

func (g *gate) pass(closed <-chan struct{}) error {
	g.mu.Lock()
	way := g.way
	g.mu.Unlock()
	select {
	case <-way:
		return nil
	case <-closed:
		return net.ErrClosed
	}
}

// gatedConn is a connection through a gate.
type gatedConn struct {
	net.Conn
	gate   *gate
	once   sync.Once
	closed chan struct{}
}

func (c *gatedConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if passErr := c.gate.pass(c.closed); passErr != nil {
		return 0, passErr
	}
	return n, err
}

func (c *gatedConn) Write(p []byte) (int, error) {
	if err := c.gate.pass(c.closed); err != nil {
		return 0, err
	}
	return c.Conn.Write(p)
}

// WriteMsgUnix is of a *net.UnixConn, over which descriptors go.
func (c *gatedConn) WriteMsgUnix(b, oob []byte, addr *net.UnixAddr) (n, oobn int, err error) {
	if err := c.gate.pass(c.closed); err != nil {
		return 0, 0, err
	}
	return c.Conn.(*net.UnixConn).WriteMsgUnix(b, oob, addr) //nolint:forcetypeassert // connOf makes no other
}

func (c *gatedConn) Close() error {
	c.once.Do(func() { close(c.closed) })
	return c.Conn.Close()
}
