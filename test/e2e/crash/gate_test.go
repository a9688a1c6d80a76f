package crash

import (
	"bufio"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// gate is where a daemon with points asks at each of them whether it may go on.
type gate struct {
	path string

	mu   sync.Mutex // guards what follows
	trap *trap
	seen map[string]time.Duration // when a point was first come to
	from time.Time
}

// trap is set at a point, for the first time that something comes there.
type trap struct {
	at string
	do func()
	// The point that something must have come to before; empty if none.
	after string
	// Closed when do has returned.
	sprung chan struct{}
	hit    bool
}

func openGate(t *testing.T) *gate {
	t.Helper()
	g := &gate{path: filepath.Join(t.TempDir(), "gate"), seen: map[string]time.Duration{}}
	l, err := net.Listen("unix", g.path)
	harness.Must(t, err)
	t.Cleanup(func() { _ = l.Close() })
	go func() { // until it is closed
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go g.ask(conn)
		}
	}()
	return g
}

func (g *gate) ask(conn net.Conn) {
	defer conn.Close() // it may go on
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		return
	}
	at := strings.Replace(strings.TrimSuffix(line, "\n"), "\t", ": ", 1)
	g.mu.Lock()
	t := g.trap
	armed := t != nil
	if armed && t.after != "" {
		_, armed = g.seen[t.after]
	}
	if _, known := g.seen[at]; !known {
		g.seen[at] = time.Since(g.from)
	}
	springs := armed && t.at == at && !t.hit
	if springs {
		t.hit = true
	}
	g.mu.Unlock()
	if springs {
		t.do()
		close(t.sprung)
	}
}

// set sets a trap; without one, everything passes. What was seen is forgotten.
func (g *gate) set(at string, do func()) *trap { return g.setAfter("", at, do) }

// setAfter sets a trap for the first time that something comes there after another point.
func (g *gate) setAfter(after, at string, do func()) *trap {
	t := &trap{at: at, after: after, do: do, sprung: make(chan struct{})}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.trap, g.seen, g.from = t, map[string]time.Duration{}, time.Now()
	return t
}

func (g *gate) clear() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.trap = nil
}

// wasSeen answers with the points that were come to since set, and when.
func (g *gate) wasSeen() map[string]time.Duration {
	g.mu.Lock()
	defer g.mu.Unlock()
	seen := make(map[string]time.Duration, len(g.seen))
	for at, when := range g.seen {
		seen[at] = when
	}
	return seen
}

// await waits until the trap's work is done, if it was sprung.
func (t *trap) await(g *gate) bool {
	g.mu.Lock()
	hit := t.hit
	g.mu.Unlock()
	if hit {
		<-t.sprung
	}
	return hit
}
