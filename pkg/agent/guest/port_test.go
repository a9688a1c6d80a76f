package guest

import (
	"bytes"
	"io"
	"os"
	"testing"

	"github.com/xtaci/smux"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// aPort is a port without a guest, and a session that a daemon has begun on it. What is handed on comes out of the reader.
func aPort(t *testing.T) (*port, *io.PipeReader) {
	t.Helper()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { null.Close() })
	p := &port{file: null, mark: spec.ChannelMark([spec.TokenLen]byte{7}), changed: make(chan struct{})}
	s := &portSession{port: p}
	s.in, s.feed = io.Pipe()
	p.session = s
	return p, s.in
}

// Whatever a message ends with, it is handed on whole: whoever waits for an answer to it sends no more.
func TestPortHoldsNothingBack(t *testing.T) {
	p, out := aPort(t)
	for n := range spec.ChannelMarkLen {
		message := append([]byte("a message "), p.mark[:n]...)
		got := make([]byte, len(message))
		done := make(chan error, 1)
		go func() {
			_, err := io.ReadFull(out, got)
			done <- err
		}()
		if held := p.take(bytes.Clone(message)); len(held) > 0 {
			t.Fatalf("of a message that ends like a mark %q is held back", held)
		}
		if err := <-done; err != nil || !bytes.Equal(got, message) {
			t.Errorf("handed on is %q, %v, want %q", got, err, message)
		}
	}
}

// A greeting is found wherever it begins and however it is cut into pieces.
func TestPortFindsGreetings(t *testing.T) {
	for cut := 1; cut < spec.ChannelGreetingLen; cut++ {
		p, _ := aPort(t)
		first := p.session
		first.buffered = bytes.NewReader(nil)
		var err error
		if first.mux, err = smux.Client(first, channelConfig()); err != nil {
			t.Fatal(err)
		}
		first.in.Close() // what is given to it is lost
		greeting := append(bytes.Clone(p.mark[:]), bytes.Repeat([]byte("x"), spec.ChannelGreetingLen-spec.ChannelMarkLen)...)
		stream := append([]byte("before"), greeting...)
		held := p.take(stream[:len("before")+cut])
		if p.session != first {
			t.Fatalf("cut at %d: half a greeting was taken for a whole", cut)
		}
		if held = p.take(append(held, stream[len("before")+cut:]...)); len(held) > 0 || p.session == first || p.session == nil {
			t.Errorf("cut at %d: the greeting was not found; held back is %q", cut, held)
		}
		p.replace(nil)
	}
}
