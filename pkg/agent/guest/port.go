package guest

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/xtaci/smux"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// portWait bounds the wait for the port to come up; the kernel finds it while the agent starts.
	portWait = 10 * time.Second
	// lastPortRetry is how seldom the agent looks at a port that nobody has held for long.
	lastPortRetry = 100 * time.Millisecond
	portBuffer    = 64 << 10
)

// port is a virtio-serial port that carries the agent's connections: see spec/channel.go. It outlives every daemon, and
// the agent's own copying: what a daemon greets replaces what was before.
type port struct {
	file *os.File

	// The last bytes that were handed on, fewer than a mark has: it may have begun in them. Of the goroutine that reads.
	given []byte

	// Held while bytes are written, so that nothing of an earlier session follows a later one's.
	writing sync.Mutex

	mu      sync.Mutex
	mark    [spec.ChannelMarkLen]byte
	session *portSession  // nil until a daemon greets
	changed chan struct{} // closed when session changes
}

// portSession is what one daemon's connection carries.
type portSession struct {
	port *port
	mux  *smux.Session
	in   *io.PipeReader
	feed *io.PipeWriter
	// What the multiplexer reads: its headers are 8 bytes each.
	buffered io.Reader
}

// openPort finds the port by its name and starts reading it, which ends with the guest.
func openPort(name string) (*port, error) {
	path, err := findPort(name)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open port %q: %w", name, err)
	}
	file, err := pollable(fd, path)
	if err != nil {
		return nil, err
	}
	p := &port{file: file, mark: spec.ChannelMark([spec.TokenLen]byte{}), changed: make(chan struct{})}
	go p.read()
	return p, nil
}

func findPort(name string) (string, error) {
	for deadline := time.Now().Add(portWait); ; time.Sleep(diskInterval) {
		names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
		if err != nil {
			return "", err
		}
		for _, file := range names {
			found, err := os.ReadFile(file)
			if err == nil && strings.TrimSpace(string(found)) == name {
				return "/dev/" + filepath.Base(filepath.Dir(file)), nil
			}
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("cannot find port %q: it did not come up in %v", name, portWait)
		}
	}
}

// adopted makes the agent listen to greetings for its token only.
func (p *port) adopted(token [spec.TokenLen]byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mark = spec.ChannelMark(token)
}

// dial opens a stream to the daemon, waiting until there is one.
func (p *port) dial(ctx context.Context) (net.Conn, error) {
	for {
		p.mu.Lock()
		s, changed := p.session, p.changed
		p.mu.Unlock()
		if s != nil {
			if stream, err := s.mux.OpenStream(); err == nil {
				return stream, nil
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// read hands what comes to the session it is for, looking for greetings in it.
func (p *port) read() {
	buffer := make([]byte, portBuffer)
	var held []byte
	for retry := spec.ChannelRetry; ; {
		n, err := p.file.Read(buffer)
		if n == 0 {
			if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, unix.EINTR) {
				// Seen for an instant while a host side comes or goes; a port that is gone goes with the guest.
				retry = lastPortRetry
			}
			// Nobody holds the other end, or nobody did a moment ago: the kernel says so late, when a daemon may have greeted
			// already. So what there is stays until the next greeting.
			time.Sleep(retry)
			retry = min(2*retry, lastPortRetry)
			continue
		}
		retry = spec.ChannelRetry
		held = p.take(append(held, buffer[:n]...))
	}
}

// take hands on b, and answers with what it held back: the beginning of a greeting, from its whole mark on. Nothing else is held
// back. A few bytes that might be the beginning of a mark are what an ordinary message ends with, too, one in 256, and whoever
// waits for an answer to it sends no more; given to a session that a greeting then ends, they do no harm.
func (p *port) take(b []byte) []byte {
	for {
		p.mu.Lock()
		mark, session := p.mark, p.session
		p.mu.Unlock()
		whole := append(bytes.Clone(p.given), b...)
		at := bytes.Index(whole, mark[:])
		if at < 0 {
			session.give(b)
			p.given = whole[max(0, len(whole)-len(mark)+1):]
			return nil
		}
		if at > len(p.given) {
			session.give(whole[len(p.given):at])
		}
		p.given = nil
		if b = whole[at:]; len(b) < spec.ChannelGreetingLen {
			return b
		}
		p.greet(b[spec.ChannelMarkLen:spec.ChannelGreetingLen])
		b = b[spec.ChannelGreetingLen:]
	}
}

// greet ends the session there was, answers and begins a new one.
func (p *port) greet(answer []byte) {
	p.replace(nil)
	p.writing.Lock()
	_, err := p.file.Write(answer)
	p.writing.Unlock()
	if err != nil {
		return // the daemon has gone again
	}
	s := &portSession{port: p}
	s.in, s.feed = io.Pipe()
	s.buffered = bufio.NewReaderSize(s.in, portBuffer)
	if s.mux, err = smux.Client(s, channelConfig()); err != nil {
		return // never: the configuration is a constant
	}
	p.replace(s)
}

// replace makes s the session, and ends the one before.
func (p *port) replace(s *portSession) {
	p.mu.Lock()
	before := p.session
	p.session = s
	if before != s {
		close(p.changed)
		p.changed = make(chan struct{})
	}
	p.mu.Unlock()
	if before != nil && before != s {
		_ = before.mux.Close() // nothing is waited for
	}
}

func channelConfig() *smux.Config {
	return &smux.Config{
		Version: spec.ChannelVersion, KeepAliveDisabled: true, MaxFrameSize: spec.ChannelFrame,
		MaxReceiveBuffer: spec.ChannelBuffer, MaxStreamBuffer: spec.ChannelStreamBuffer,
	}
}

// give hands bytes to the multiplexer. Without one they are left over from an earlier daemon.
func (s *portSession) give(b []byte) {
	if s != nil && len(b) > 0 {
		_, _ = s.feed.Write(b) // a session that has ended takes nothing
	}
}

// Read implements io.Reader, for the multiplexer.
func (s *portSession) Read(b []byte) (int, error) { return s.buffered.Read(b) }

// Write implements io.Writer, for the multiplexer.
func (s *portSession) Write(b []byte) (int, error) {
	s.port.writing.Lock()
	defer s.port.writing.Unlock()
	s.port.mu.Lock()
	current := s.port.session == s
	s.port.mu.Unlock()
	if !current {
		return 0, net.ErrClosed
	}
	return s.port.file.Write(b)
}

// Close implements io.Closer, for the multiplexer. The port stays.
func (s *portSession) Close() error {
	_ = s.in.Close()   // never fails
	_ = s.feed.Close() // never fails
	return nil
}
