package agent

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// maxOpenCalls bounds the calls of one connection that were not answered. An agent answers each some day, also when nobody
// waits for it any more; each that it owes costs the daemon a few bytes.
const maxOpenCalls = 16 << 10

// openCalls are the calls of a connection that were sent and not answered. An agent has exactly one answer to each, so that one
// which sends frames without end is found out by its first.
type openCalls struct {
	mu sync.Mutex
	// By stream, guarded by mu.
	open map[uint32]bool

	// Of the frame that is being sent, by one writer at a time: what of its header was seen, and how much is left of the rest.
	header [frameHeader]byte
	seen   int
	rest   uint32
}

// sending notes the calls that begin in b, the next bytes on their way to the agent, however they are cut into frames.
func (o *openCalls) sending(b []byte) error {
	for len(b) > 0 {
		if o.rest > 0 {
			n := min(uint64(o.rest), uint64(len(b)))
			o.rest -= uint32(n)
			b = b[n:]
			continue
		}
		n := copy(o.header[o.seen:], b)
		b = b[n:]
		if o.seen += n; o.seen < len(o.header) {
			continue
		}
		o.seen, o.rest = 0, binary.BigEndian.Uint32(o.header[:])
		if err := o.begin(streamOf(o.header)); err != nil {
			return err
		}
	}
	return nil
}

func (o *openCalls) begin(stream uint32) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.open) >= maxOpenCalls {
		return fmt.Errorf("%d calls without an answer", len(o.open))
	}
	if o.open == nil {
		o.open = map[uint32]bool{}
	}
	o.open[stream] = true
	return nil
}

// answered notes an answer. It is an error if there was no such call, or another answer to it.
func (o *openCalls) answered(stream uint32) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if !o.open[stream] && !weaken.Without("match answers with calls") {
		return fmt.Errorf("an answer to call %d, which was not made or has its answer", stream)
	}
	delete(o.open, stream)
	return nil
}

// streamOf is the stream that a frame belongs to: each call has one of its own.
func streamOf(header [frameHeader]byte) uint32 {
	return binary.BigEndian.Uint32(header[frameStreamAt:])
}
