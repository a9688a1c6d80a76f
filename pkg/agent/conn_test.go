package agent

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"testing"
	"testing/iotest"

	"google.golang.org/protobuf/encoding/protowire"
)

// frameOf is a ttrpc frame.
func frameOf(kind byte, content []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(content)))
	b = binary.BigEndian.AppendUint32(b, 1)
	return append(append(b, kind, 0), content...)
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
		frameOf(frameResponse, nil),
		frameOf(frameResponse, payloadOf([]byte{0x08, 0x01})),
		frameOf(frameResponse, payloadOf(payloadOf(make([]byte, readBytes)))),
		frameOf(frameResponse, payloadOf(bytes.Repeat([]byte{0x0a, 0x00}, maxChunks))),
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
	}
	cuts := map[string]func(io.Reader) io.Reader{
		"whole": func(r io.Reader) io.Reader { return r }, "bytes": iotest.OneByteReader, "halves": iotest.HalfReader,
	}
	for how, cut := range cuts {
		all := bytes.Join(good, nil)
		c := newConn(&fakeConn{Reader: cut(bytes.NewReader(all))})
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, all) || c.violation() != nil {
			t.Errorf("%s: %d of %d bytes, %v, %v", how, len(got), len(all), err, c.violation())
		}
		for name, frame := range bad {
			raw := &fakeConn{Reader: cut(bytes.NewReader(append(bytes.Clone(good[1]), frame...)))}
			c := newConn(raw)
			got, err := io.ReadAll(c)
			if err == nil || !bytes.Equal(got, good[1]) || c.violation() == nil || !raw.closed {
				t.Errorf("%s in %s: %d bytes, %v, %v, closed %v", name, how, len(got), err, c.violation(), raw.closed)
			}
		}
	}
	// Cut anywhere, a frame is an end and no offence.
	for at := range good[1] {
		c := newConn(&fakeConn{Reader: bytes.NewReader(good[1][:at])})
		if got, err := io.ReadAll(c); len(got) > 0 || c.violation() != nil || at > 0 && err == nil {
			t.Errorf("cut at %d: %d bytes, %v, %v", at, len(got), err, c.violation())
		}
	}
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
