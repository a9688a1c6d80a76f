package agent

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync/atomic"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

const (
	// writeLimit bounds one write to an agent. An agent reads all the time, whatever its calls wait for, so one that takes
	// nothing for that long is stuck or hostile; and ttrpc writes under a lock that every other call needs.
	writeLimit = 10 * time.Second
	// maxFrame bounds an answer: readBytes of output, and the most bookkeeping an agent keeps with it, which is 270 KiB.
	maxFrame = 640 << 10
	// maxEnvelope bounds the fields of an answer beside its payload, and those of its status.
	maxEnvelope = 16
	// frameBuffer holds most answers whole.
	frameBuffer = 4 << 10
)

// ttrpc's frame: https://github.com/containerd/ttrpc/blob/main/PROTOCOL.md.
const (
	frameHeader   = 10 // length, stream, type, flags
	frameStreamAt = 4
	frameTypeAt   = 8
	frameResponse = 2
)

// conn is a connection to an agent that may be hostile. It never blocks for ever, and hands on only frames that answer a call,
// the first time, and are no larger, and decode to no more objects, than an answer of ours: decoding multiplies size, up to
// sixtyfold for messages that are empty.
type conn struct {
	net.Conn
	calls  openCalls
	reader *bufio.Reader
	frame  []byte // the rest of one that was checked
	// The frame that ended the connection.
	broken atomic.Pointer[error]
}

func newConn(c net.Conn) *conn { return &conn{Conn: c, reader: bufio.NewReaderSize(c, frameBuffer)} }

// Write implements net.Conn. A frame that was written in part can't be repaired: any failure ends the connection.
func (c *conn) Write(b []byte) (int, error) {
	// Before they are sent, since the answer may be here before the write returns.
	if err := c.calls.sending(b); err != nil {
		return 0, c.refuse("%w", err)
	}
	err := c.SetWriteDeadline(time.Now().Add(writeLimit))
	n := 0
	if err == nil {
		n, err = c.Conn.Write(b)
	}
	if err != nil {
		c.Close()
	}
	return n, err
}

// Read implements net.Conn. It is called by one goroutine.
func (c *conn) Read(b []byte) (int, error) {
	if len(c.frame) == 0 {
		if err := c.next(); err != nil {
			return 0, err
		}
	}
	n := copy(b, c.frame)
	if c.frame = c.frame[n:]; len(c.frame) == 0 {
		c.frame = nil // it may be large, and the next may be long in coming
	}
	return n, nil
}

// next reads a frame and checks it.
func (c *conn) next() error {
	var header [frameHeader]byte
	if _, err := io.ReadFull(c.reader, header[:]); err != nil {
		return err
	}
	length := binary.BigEndian.Uint32(header[:])
	if length > maxFrame && !weaken.Without("bound answers") {
		return c.refuse("an answer of %d bytes, more than %d", length, maxFrame)
	}
	if header[frameTypeAt] != frameResponse {
		return c.refuse("a message of type %d, which is no answer", header[frameTypeAt])
	}
	if err := c.calls.answered(streamOf(header)); err != nil {
		return c.refuse("%w", err)
	}
	frame := make([]byte, frameHeader+length)
	copy(frame, header[:])
	if _, err := io.ReadFull(c.reader, frame[frameHeader:]); err != nil {
		return fmt.Errorf("cannot read the rest of an answer: %w", err)
	}
	if err := checkAnswer(frame[frameHeader:]); err != nil {
		return c.refuse("%w", err)
	}
	c.frame = frame
	return nil
}

// refuse ends the connection for good reason.
func (c *conn) refuse(format string, args ...any) error {
	err := protocolError(format, args...)
	c.broken.Store(&err)
	c.Close()
	return err
}

// violation is why the connection was ended, nil if it was for no fault of the agent's.
func (c *conn) violation() error {
	if err := c.broken.Load(); err != nil {
		return *err
	}
	return nil
}

// Fields of ttrpc's Response.
const (
	responseStatus  = 1
	responsePayload = 2
)

// checkAnswer counts the fields of an encoded ttrpc Response, each of which may become an object when it is decoded.
func checkAnswer(b []byte) error {
	envelope, chunks := 0, 0
	err := eachField(b, func(field protowire.Number, value []byte) error {
		if envelope++; envelope > maxEnvelope {
			return fmt.Errorf("more than %d fields around an answer", maxEnvelope)
		}
		switch field {
		case responseStatus:
			return eachField(value, func(protowire.Number, []byte) error {
				if envelope++; envelope > maxEnvelope {
					return fmt.Errorf("more than %d fields in a status", maxEnvelope)
				}
				return nil
			})
		case responsePayload:
			return eachField(value, func(protowire.Number, []byte) error {
				if chunks++; chunks > maxChunks {
					return fmt.Errorf("more than %d fields in an answer", maxChunks)
				}
				return nil
			})
		}
		return nil
	})
	return err
}

// eachField calls fn with each field of an encoded message, and with its bytes where it may be a message itself.
func eachField(b []byte, fn func(protowire.Number, []byte) error) error {
	for len(b) > 0 {
		field, kind, n := protowire.ConsumeTag(b)
		if n < 0 {
			return fmt.Errorf("a message that can't be decoded: %w", protowire.ParseError(n))
		}
		b = b[n:]
		var value []byte
		if kind == protowire.BytesType {
			value, n = protowire.ConsumeBytes(b)
		} else {
			n = protowire.ConsumeFieldValue(field, kind, b)
		}
		if n < 0 {
			return fmt.Errorf("a message that can't be decoded: %w", protowire.ParseError(n))
		}
		if err := fn(field, value); err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}
