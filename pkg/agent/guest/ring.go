package guest

import (
	"context"
	"errors"
	"sync"
	"time"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

var (
	errForgotten = errors.New("output is forgotten: the process was released")
	errOffset    = errors.New("offset is not in the output that is kept")
)

// coalesceWithin and coalesceUpTo say when a piece of output joins the one before it: close enough in time for one time
// stamp, small enough that many single bytes don't become many chunks.
const (
	coalesceWithin = 2 * time.Millisecond
	coalesceUpTo   = 4096
)

type chunk struct {
	stream agentv1.Stream
	time   time.Time
	data   []byte
}

// ring keeps a process's output from the byte the daemon last acknowledged to the last byte read from the process. Nothing
// is dropped: when it is full, write waits, then the pipe fills, then the process waits.
type ring struct {
	mu     sync.Mutex
	space  sync.Cond // something was acknowledged, or the ring was forgotten
	chunks []chunk
	// Offsets of the first byte kept and of the byte after the last.
	start, end uint64
	cost       int // bytes kept, and chunkCost for each chunk
	writers    int // streams that may still write
	forgotten  bool
	// Closed, and nil again, when output or the end of it comes. nil while nobody waits.
	news chan struct{}
}

func newRing(writers int) *ring {
	r := &ring{writers: writers}
	r.space.L = &r.mu
	return r
}

// write takes ownership of data. It waits while the ring is full and fails only when the ring is forgotten.
func (r *ring) write(stream agentv1.Stream, data []byte) error {
	if len(data) == 0 {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.cost >= maxOutputBytes && !r.forgotten {
		r.space.Wait()
	}
	if r.forgotten {
		return errForgotten
	}
	now := time.Now()
	if n := len(r.chunks); n > 0 {
		last := &r.chunks[n-1]
		if last.stream == stream && len(last.data)+len(data) <= coalesceUpTo && now.Sub(last.time) < coalesceWithin {
			// Readers hold slices of last.data that end before what is appended here.
			last.data = append(last.data, data...)
			r.cost += len(data)
			r.end += uint64(len(data))
			r.tellLocked()
			return nil
		}
	}
	r.chunks = append(r.chunks, chunk{stream, now, data})
	r.cost += len(data) + chunkCost
	r.end += uint64(len(data))
	r.tellLocked()
	return nil
}

// closeWriter is called once for each of the ring's writers, when its stream has ended.
func (r *ring) closeWriter() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.writers--
	r.tellLocked()
}

// forget frees what is kept and makes every writer fail and every reader see the end.
func (r *ring) forget() {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.forgotten = true
	r.chunks, r.cost, r.start = nil, 0, r.end
	r.space.Broadcast()
	r.tellLocked()
}

// read acknowledges everything before offset and answers with at most limit bytes from there on, waiting until ctx is done
// if there are none yet. A wait that runs out is no error.
func (r *ring) read(ctx context.Context, offset uint64, limit int) ([]chunk, bool, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		if r.forgotten {
			return nil, true, errForgotten
		}
		if offset < r.start || offset > r.end {
			return nil, false, errOffset
		}
		r.acknowledgeLocked(offset)
		if r.end > offset || r.writers == 0 {
			break
		}
		if r.news == nil {
			r.news = make(chan struct{})
		}
		news := r.news
		r.mu.Unlock()
		select {
		case <-news:
			r.mu.Lock()
		case <-ctx.Done():
			r.mu.Lock()
			return nil, false, nil
		}
	}
	var out []chunk
	for _, c := range r.chunks {
		if limit <= 0 {
			break
		}
		c.data = c.data[:min(len(c.data), limit)]
		limit -= len(c.data)
		offset += uint64(len(c.data))
		out = append(out, c)
	}
	return out, r.writers == 0 && offset == r.end, nil
}

func (r *ring) acknowledgeLocked(offset uint64) {
	drop := 0
	for r.start < offset {
		c := &r.chunks[drop]
		n := min(uint64(len(c.data)), offset-r.start)
		r.start += n
		r.cost -= int(n)
		if c.data = c.data[n:]; len(c.data) > 0 {
			break
		}
		r.cost -= chunkCost
		drop++
	}
	if drop == 0 {
		r.space.Broadcast()
		return
	}
	rest := copy(r.chunks, r.chunks[drop:])
	clear(r.chunks[rest:])
	r.chunks = r.chunks[:rest]
	r.space.Broadcast()
}

func (r *ring) tellLocked() {
	if r.news != nil {
		close(r.news)
		r.news = nil
	}
}
