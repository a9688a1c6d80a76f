package agent

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"testing"
	"testing/iotest"

	"google.golang.org/protobuf/encoding/protowire"
)

// frameOf is a ttrpc frame of stream 1.
func frameOf(kind byte, content []byte) []byte { return frameIn(1, kind, content) }

func frameIn(stream uint32, kind byte, content []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(content)))
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(append(b, kind, 0), content...)
}

// called is a connection over which calls were made.
func called(t *testing.T, raw net.Conn, streams ...uint32) *conn {
	t.Helper()
	c := newConn(raw)
	for _, s := range streams {
		if err := c.calls.sending(frameIn(s, 1, []byte("a call"))); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

func payloadOf(content []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, responsePayload, protowire.BytesType), content)
}

// fakeConn reads from a reader.
type fakeConn struct {
	net.Conn
	io.Reader
	closed bool
}

func (f *fakeConn) Read(b []byte) (int, error) { return f.Reader.Read(b) }

func (f *fakeConn) Close() error {
	f.closed = true
	return nil
}

// TestFrames: what is an answer passes unchanged, however it is cut, and nothing of what is none.
func TestFrames(t *testing.T) {
	good := [][]byte{
		frameIn(7, frameResponse, nil),
		frameIn(3, frameResponse, payloadOf([]byte{0x08, 0x01})),
		frameIn(5, frameResponse, payloadOf(payloadOf(make([]byte, readBytes)))),
		frameIn(9, frameResponse, payloadOf(bytes.Repeat([]byte{0x0a, 0x00}, maxChunks))),
	}
	details := bytes.Repeat([]byte{0x1a, 0x00}, 100)
	bad := map[string][]byte{
		"larger than any answer": frameOf(frameResponse, payloadOf(payloadOf(make([]byte, maxFrame)))),
		"larger than there is":   {0x00, 0x40, 0x00, 0x00, 0, 0, 0, 1, frameResponse, 0},
		"no answer":              frameOf(3, nil),
		"many chunks":            frameOf(frameResponse, payloadOf(bytes.Repeat([]byte{0x0a, 0x00}, maxChunks+1))),
		"many payloads":          frameOf(frameResponse, bytes.Repeat([]byte{0x12, 0x00}, 100)),
		"many details":           frameOf(frameResponse, protowire.AppendBytes([]byte{0x0a}, details)),
		"cut field":              frameOf(frameResponse, []byte{0x12, 0x05, 0x00}),
		"no field":               frameOf(frameResponse, []byte{0xff}),
		"answer to nobody":       frameIn(11, frameResponse, nil),
		"second answer":          good[1],
	}
	cuts := map[string]func(io.Reader) io.Reader{
		"whole": func(r io.Reader) io.Reader { return r }, "bytes": iotest.OneByteReader, "halves": iotest.HalfReader,
	}
	for how, cut := range cuts {
		all := bytes.Join(good, nil)
		c := called(t, &fakeConn{Reader: cut(bytes.NewReader(all))}, 3, 5, 7, 9)
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, all) || c.violation() != nil {
			t.Errorf("%s: %d of %d bytes, %v, %v", how, len(got), len(all), err, c.violation())
		}
		for name, frame := range bad {
			raw := &fakeConn{Reader: cut(bytes.NewReader(append(bytes.Clone(good[1]), frame...)))}
			c := called(t, raw, 1, 3)
			got, err := io.ReadAll(c)
			if err == nil || !bytes.Equal(got, good[1]) || c.violation() == nil || !raw.closed {
				t.Errorf("%s in %s: %d bytes, %v, %v, closed %v", name, how, len(got), err, c.violation(), raw.closed)
			}
		}
	}
	// Cut anywhere, a frame is an end and no offence.
	for at := range good[1] {
		c := called(t, &fakeConn{Reader: bytes.NewReader(good[1][:at])}, 3)
		if got, err := io.ReadAll(c); len(got) > 0 || c.violation() != nil || at > 0 && err == nil {
			t.Errorf("cut at %d: %d bytes, %v, %v", at, len(got), err, c.violation())
		}
	}
}

// TestOpenCalls: calls are known however what is sent is cut, and one to which no answer comes is remembered, up to a bound.
func TestOpenCalls(t *testing.T) {
	const calls = 5
	var sent []byte
	for i := range uint32(calls) {
		sent = append(sent, frameIn(2*i+1, 1, make([]byte, 7*i))...)
	}
	for size := 1; size <= len(sent); size++ {
		var o openCalls
		for piece := range slices.Chunk(sent, size) {
			if err := o.sending(piece); err != nil {
				t.Fatal(err)
			}
		}
		for i := range uint32(calls) {
			if err := o.answered(2*i + 1); err != nil {
				t.Errorf("in pieces of %d: %v", size, err)
			}
			if o.answered(2*i+1) == nil || o.answered(2*i) == nil {
				t.Errorf("in pieces of %d, an answer too many is taken", size)
			}
		}
		if len(o.open) > 0 {
			t.Errorf("in pieces of %d, %d calls are open", size, len(o.open))
		}
	}
	var o openCalls
	for i := range uint32(maxOpenCalls) {
		if err := o.sending(frameIn(2*i+1, 1, nil)); err != nil {
			t.Fatal(err)
		}
	}
	if err := o.sending(frameIn(2*maxOpenCalls+1, 1, nil)); err == nil {
		t.Errorf("more than %d calls are open", maxOpenCalls)
	}
}

// FuzzFrames: of whatever an agent sends, what is handed on are whole answers to calls that were made, one to each.
func FuzzFrames(f *testing.F) {
	f.Add(append(frameIn(3, frameResponse, payloadOf([]byte{0x08, 0x01})), frameIn(1, frameResponse, nil)...))
	f.Add(append(frameIn(1, frameResponse, nil), frameIn(1, frameResponse, nil)...))
	f.Add(frameIn(5, frameResponse, nil))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, frameResponse, 0})
	f.Fuzz(func(t *testing.T, sent []byte) {
		c := called(t, &fakeConn{Reader: bytes.NewReader(sent)}, 1, 3)
		got, err := io.ReadAll(c)
		if !bytes.HasPrefix(sent, got) || err == nil && len(got) != len(sent) {
			t.Fatalf("%d bytes of %d, %v", len(got), len(sent), err)
		}
		answered := map[uint32]bool{}
		for len(got) > 0 {
			stream, end := binary.BigEndian.Uint32(got[4:]), frameHeader+int(binary.BigEndian.Uint32(got))
			if answered[stream] || stream != 1 && stream != 3 || end > len(got) || got[frameTypeAt] != frameResponse {
				t.Fatalf("handed on: stream %d, %d bytes of %d", stream, end, len(got))
			}
			answered[stream] = true
			got = got[end:]
		}
	})
}

func FuzzCheckAnswer(f *testing.F) {
	f.Add(payloadOf([]byte{0x0a, 0x00}))
	f.Add([]byte{0x0b, 0x0c})
	f.Fuzz(func(t *testing.T, b []byte) {
		if err := checkAnswer(b); err != nil && fmt.Sprint(err) == "" {
			t.Error("an error that says nothing")
		}
	})
}
