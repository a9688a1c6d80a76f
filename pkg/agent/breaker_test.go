package agent_test

import (
	"net"
	"sync"
)

// breaker cuts connections at will.
type breaker struct {
	mu    sync.Mutex
	conns []net.Conn
	cuts  int
	count int
}

// made counts the connections there ever were.
func (b *breaker) made() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.count
}

func (b *breaker) wrap(c net.Conn) net.Conn {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.conns = append(b.conns, c)
	b.count++
	return c
}

// cut closes every connection there is.
func (b *breaker) cut() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.conns {
		c.Close()
	}
	b.conns = nil
	b.cuts++
}
