package guest

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

const (
	out = agentv1.Stream_STREAM_STDOUT
	err = agentv1.Stream_STREAM_STDERR
)

// TestRingKeepsOrder has two writers and a reader that acknowledges at random and often asks again.
func TestRingKeepsOrder(t *testing.T) {
	const size = 4 << 20
	r := newRing(2)
	want := map[agentv1.Stream][]byte{}
	var writers sync.WaitGroup
	for i, stream := range []agentv1.Stream{out, err} {
		random := rand.New(rand.NewPCG(1, uint64(i)))
		data := make([]byte, size)
		for j := range data {
			data[j] = byte(random.Uint32())
		}
		want[stream] = data
		writers.Go(func() {
			defer r.closeWriter()
			for len(data) > 0 {
				n := min(len(data), 1+random.IntN(3000))
				if r.write(stream, bytes.Clone(data[:n])) != nil {
					t.Error("forgotten")
				}
				data = data[n:]
			}
		})
	}
	got := map[agentv1.Stream][]byte{}
	random := rand.New(rand.NewPCG(2, 2))
	var offset uint64
	for {
		chunks, eof, readErr := r.read(t.Context(), offset, 1+random.IntN(100_000))
		if readErr != nil {
			t.Fatal(readErr)
		}
		if random.IntN(3) == 0 {
			continue // as if the answer was lost
		}
		for _, c := range chunks {
			offset += uint64(len(c.data))
			got[c.stream] = append(got[c.stream], c.data...)
		}
		r.mu.Lock()
		if r.cost > maxOutputBytes+4096+chunkCost {
			t.Errorf("%d bytes are kept", r.cost)
		}
		r.mu.Unlock()
		if eof {
			break
		}
	}
	writers.Wait()
	for stream := range want {
		if !bytes.Equal(got[stream], want[stream]) {
			t.Errorf("stream %v differs", stream)
		}
	}
	if _, eof, readErr := r.read(t.Context(), offset, 1); !eof || readErr != nil {
		t.Errorf("after the end: %v %v", eof, readErr)
	}
	if r.cost != 0 || len(r.chunks) != 0 {
		t.Errorf("%d bytes in %d chunks are kept after the end", r.cost, len(r.chunks))
	}
}

// TestRingCountsItsOwnCost: single bytes to alternating streams fill it long before 1 MiB of them.
func TestRingCountsItsOwnCost(t *testing.T) {
	r := newRing(2)
	full := make(chan int)
	go func() {
		n := 0
		for ; r.write([]agentv1.Stream{out, err}[n%2], []byte("x")) == nil; n++ {
		}
		full <- n
	}()
	for {
		r.mu.Lock()
		cost := r.cost
		r.mu.Unlock()
		if cost >= maxOutputBytes {
			break
		}
	}
	r.forget()
	if n := <-full; n > maxOutputBytes/chunkCost {
		t.Errorf("%d chunks were kept", n)
	}
}

func TestRingOffsets(t *testing.T) {
	r := newRing(1)
	_ = r.write(out, []byte("0123456789"))
	if _, _, got := r.read(t.Context(), 11, 5); !errors.Is(got, errOffset) {
		t.Errorf("beyond the end: %v", got)
	}
	if chunks, _, got := r.read(t.Context(), 4, 3); got != nil || string(chunks[0].data) != "456" {
		t.Errorf("from the middle: %v %v", chunks, got)
	}
	if _, _, got := r.read(t.Context(), 3, 5); !errors.Is(got, errOffset) {
		t.Errorf("acknowledged already: %v", got)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if chunks, eof, got := r.read(ctx, 10, 5); len(chunks) > 0 || eof || got != nil {
		t.Errorf("nothing yet: %v %v %v", chunks, eof, got)
	}
	waiting := make(chan error)
	go func() {
		_, _, got := r.read(t.Context(), 10, 5)
		waiting <- got
	}()
	r.forget()
	if got := <-waiting; !errors.Is(got, errForgotten) {
		t.Errorf("forgotten: %v", got)
	}
}
