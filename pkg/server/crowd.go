package server

import (
	"net"
	"sync"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// maxConnectionsPerCaller bounds what one user or certificate, or one address that has proved nothing yet, can make
	// the daemon hold: a descriptor and some tens of KiB each.
	maxConnectionsPerCaller = 1024
	// maxCallsPerCaller bounds the calls of one caller under way at once, over all of its connections.
	maxCallsPerCaller = 4096
)

// crowd counts what each caller holds of the daemon, so that one who takes more than a share is refused and the others
// are not.
type crowd struct {
	mu          sync.Mutex // guards what follows
	connections map[string]int
	calls       map[string]int
}

func newCrowd() *crowd {
	return &crowd{connections: make(map[string]int), calls: make(map[string]int)}
}

// enter counts a connection until it is closed; one too many is closed at once.
func (c *crowd) enter(key string, conn net.Conn) (net.Conn, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.connections[key] >= maxConnectionsPerCaller {
		conn.Close()
		return nil, spec.Errorf(spec.KindExhausted, "%s has %d connections already", key, maxConnectionsPerCaller)
	}
	c.connections[key]++
	return &countedConn{Conn: conn, left: func() { c.leave(c.connections, key) }}, nil
}

// call counts a call until the function it answers with is called.
func (c *crowd) call(key string) (leave func(), err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.calls[key] >= maxCallsPerCaller {
		return nil, spec.Errorf(spec.KindExhausted, "%s has %d calls under way already: wait for some of them to end", key, maxCallsPerCaller)
	}
	c.calls[key]++
	return func() { c.leave(c.calls, key) }, nil
}

// leave keeps no entry of those who hold nothing, or the map would grow with every address that ever connected.
func (c *crowd) leave(counts map[string]int, key string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if counts[key]--; counts[key] <= 0 {
		delete(counts, key)
	}
}

// countedConn gives its place back when it is closed, once.
type countedConn struct {
	net.Conn
	once sync.Once
	left func()
}

func (c *countedConn) Close() error {
	c.once.Do(c.left)
	return c.Conn.Close()
}
