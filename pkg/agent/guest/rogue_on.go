//go:build sandboxd_weaken

package guest

import (
	"bytes"
	"encoding/binary"
	"net"
	"sync"
	"time"

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// rogueAfter is how long an agent that will break the protocol keeps to it, so that its workload comes to run.
const rogueAfter = 2 * time.Second

var (
	rogueOnce  sync.Once
	rogueSince time.Time
)

// rogues are the ways in which an agent that was taken over breaks the protocol, instead of sending b, which holds a frame of
// ttrpc: length, stream, type and flags in ten bytes, and what the length says.
var rogues = []struct {
	name string
	do   func(c net.Conn, b []byte) error
}{
	{"oversized frames", func(c net.Conn, b []byte) error {
		const announced, sent = 256 << 20, 200
		header := bytes.Clone(b[:10])
		binary.BigEndian.PutUint32(header, announced)
		_, err := c.Write(header)
		for range sent {
			if err != nil {
				return err
			}
			_, err = c.Write(make([]byte, 1<<20))
		}
		time.Sleep(rogueAfter) // the rest never comes
		return err
	}},
	{"misordered frames", func(c net.Conn, b []byte) error {
		other := bytes.Clone(b)
		binary.BigEndian.PutUint32(other[4:], binary.BigEndian.Uint32(b[4:])+2) // the next call, which is not made yet
		_, err := c.Write(bytes.Join([][]byte{other, b, b, other}, nil))
		return err
	}},
	{"answers to nobody", func(c net.Conn, b []byte) error {
		other := bytes.Clone(b)
		binary.BigEndian.PutUint32(other[4:], 1<<30+1)
		_, err := c.Write(bytes.Join([][]byte{other, b}, nil))
		return err
	}},
	{"calls instead of answers", func(c net.Conn, b []byte) error {
		other := bytes.Clone(b)
		other[8] = 1 // a request
		_, err := c.Write(other)
		return err
	}},
	{"garbage", func(c net.Conn, b []byte) error {
		_, err := c.Write(bytes.Repeat([]byte{0xff, 0x00, 0x5a}, 1000))
		return err
	}},
	{"endless frames", func(c net.Conn, b []byte) error {
		other := bytes.Clone(b)
		binary.BigEndian.PutUint32(other[4:], 1<<30+1)
		for {
			if _, err := c.Write(other); err != nil {
				return err
			}
		}
	}},
	{"frames that never end", func(c net.Conn, b []byte) error {
		_, err := c.Write(b[:len(b)-1])
		return err
	}},
}

func rogue(l net.Listener) net.Listener { return rogueListener{l} }

type rogueListener struct{ net.Listener }

func (l rogueListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return rogueConn{c}, nil
}

type rogueConn struct{ net.Conn }

func (c rogueConn) Write(b []byte) (int, error) {
	for _, r := range rogues {
		if len(b) <= 10 || !weaken.Without("no "+r.name) {
			continue
		}
		rogueOnce.Do(func() { rogueSince = time.Now() })
		if time.Since(rogueSince) < rogueAfter {
			break
		}
		return len(b), r.do(c.Conn, b)
	}
	return c.Conn.Write(b)
}
