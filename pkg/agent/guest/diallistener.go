package guest

import (
	"context"
	"io"
	"net"
	"sync"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Delays between attempts to dial the daemon: it may be restarting, and a guest cloned from a template finds its transport
// reset at any time. There is no last attempt.
const (
	firstRedial = 10 * time.Millisecond
	lastRedial  = 500 * time.Millisecond
)

// dialListener is a net.Listener for a server that dials its clients: it keeps one connection open on which nothing has
// been said yet, and Accept answers when the first byte arrives on it.
type dialListener struct {
	dial    func(context.Context) (net.Conn, error)
	preface []byte
	ctx     context.Context
	cancel  context.CancelFunc
	// The connection by which the guest was adopted, which has had its preface; nil once it was used. Accept's alone.
	begun net.Conn
	// readopt takes over what a daemon says on a connection that begins with spec.ReadoptionMark, and answers with the preface of
	// every later one, which conn has had; nil where nobody may. Accept's alone, as preface is.
	readopt func(conn net.Conn) (preface []byte, err error)

	mu   sync.Mutex
	idle net.Conn // closed by Close
}

func newDialListener(dial func(context.Context) (net.Conn, error), preface []byte) *dialListener {
	ctx, cancel := context.WithCancel(context.Background())
	return &dialListener{dial: dial, preface: preface, ctx: ctx, cancel: cancel}
}

// Accept implements net.Listener. The server calls it from one goroutine.
func (l *dialListener) Accept() (net.Conn, error) {
	for delay := firstRedial; ; delay = min(2*delay, lastRedial) {
		if conn, err := l.connect(); err == nil {
			first := make([]byte, 1)
			if _, err := io.ReadFull(conn, first); err == nil {
				if first[0] == spec.ReadoptionMark && l.readopt != nil {
					l.become(conn)
					delay = firstRedial
					continue
				}
				l.setIdle(nil)
				return &startedConn{Conn: conn, first: first}, nil
			}
			conn.Close()
			delay = firstRedial // it was there a moment ago
		}
		select {
		case <-time.After(delay):
		case <-l.ctx.Done():
			return nil, net.ErrClosed
		}
	}
}

func (l *dialListener) connect() (net.Conn, error) {
	if conn := l.begun; conn != nil {
		l.begun = nil
		if !l.setIdle(conn) {
			conn.Close()
			return nil, net.ErrClosed
		}
		return conn, nil
	}
	conn, err := l.dial(l.ctx)
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write(l.preface); err != nil {
		conn.Close()
		return nil, err
	}
	if !l.setIdle(conn) {
		conn.Close()
		return nil, net.ErrClosed
	}
	return conn, nil
}

// become makes conn the first connection of who the guest is from now on. If that fails it stays who it was.
func (l *dialListener) become(conn net.Conn) {
	preface, err := l.readopt(conn)
	if err != nil {
		conn.Close()
		return
	}
	l.preface, l.begun = preface, conn
}

func (l *dialListener) setIdle(conn net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ctx.Err() != nil {
		return false
	}
	l.idle = conn
	return true
}

// Close implements net.Listener.
func (l *dialListener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.cancel()
	if l.idle != nil {
		l.idle.Close()
		l.idle = nil
	}
	return nil
}

// Addr implements net.Listener.
func (l *dialListener) Addr() net.Addr { return vsockAddr{} }

// startedConn gives back the byte that showed that a connection is used.
type startedConn struct {
	net.Conn
	first []byte
}

func (c *startedConn) Read(p []byte) (int, error) {
	if len(c.first) > 0 && len(p) > 0 {
		n := copy(p, c.first)
		c.first = c.first[n:]
		return n, nil
	}
	return c.Conn.Read(p)
}
