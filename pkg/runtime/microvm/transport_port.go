package microvm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/xtaci/smux"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	portSocket = "agent.sock"
	portName   = "sandbox-agent"
	// maxStale bounds what may come from a guest between our greeting and its answer: left over from an earlier daemon's
	// session, of which no more is on its way than the channel's buffers hold.
	maxStale = 1 << 20
	// maxPortStreams bounds the streams that a guest may have open and that nobody has dialled for.
	maxPortStreams = maxWaitingPerVM
)

// portTransport carries the agent's connections as streams over one virtio-serial port: what a clone has where the host's
// kernel has no vsock, for QEMU can't clone a vhost-user device. The port is a Unix socket of QEMU's that serves one
// connection at a time.
type portTransport struct {
	record transportRecord
	// Done when the transport is closed.
	life  context.Context
	close context.CancelFunc

	// Holds one token: who has it connects.
	connecting chan struct{}

	mu    sync.Mutex
	dir   string    // guarded by mu: where its socket is
	token bootToken // guarded by mu: zero until the guest was adopted
	link  *portLink // guarded by mu: nil if there is none
}

// portLink is one connection to the port.
type portLink struct {
	conn   net.Conn
	reader *bufio.Reader
	mux    *smux.Session
	proved chan net.Conn
	// Closed when the link has ended.
	ended chan struct{}
	// The accept loop, and one goroutine per stream that is proved or closed.
	owned sync.WaitGroup

	mu      sync.Mutex
	waiting int // guarded by mu: streams being proved, and those proved that nobody took
}

func newPort(dir string, token bootToken) (transport, transportFiles, error) {
	listener, err := listenUnix(dir, portSocket)
	if err != nil {
		return nil, transportFiles{}, err
	}
	return attachPort(dir, transportRecord{Name: transportPort}, token), transportFiles{QEMU: listener}, nil
}

func attachPort(dir string, rec transportRecord, token bootToken) *portTransport {
	life, cancel := context.WithCancel(context.Background())
	return &portTransport{dir: dir, record: rec, token: token, life: life, close: cancel, connecting: make(chan struct{}, 1)}
}

func (t *portTransport) Record() transportRecord { return t.record }

// adopted implements adopter.
func (t *portTransport) adopted(token bootToken) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.token = token
}

// moved says where its socket is now.
func (t *portTransport) moved(dir string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.dir = dir
}

// Close implements transport. What runs over the port ends with it.
func (t *portTransport) Close() error {
	t.close()
	t.mu.Lock()
	link := t.link
	t.link = nil
	t.mu.Unlock()
	if link != nil {
		link.end()
		link.owned.Wait()
	}
	return nil
}

// Dial implements transport.
func (t *portTransport) Dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(t.life, cancel)()
	for {
		link, err := t.connect(ctx)
		if err == nil {
			select {
			case conn := <-link.proved:
				link.took()
				return conn, nil
			case <-link.ended:
				err = errors.New("the guest's port was closed")
			case <-ctx.Done():
				err = ctx.Err()
			}
		}
		if t.life.Err() != nil {
			return nil, net.ErrClosed
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if link == nil {
			return nil, err
		}
	}
}

// connect answers with the link, making it if there is none.
func (t *portTransport) connect(ctx context.Context) (*portLink, error) {
	select {
	case t.connecting <- struct{}{}:
		defer func() { <-t.connecting }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	t.mu.Lock()
	link, token, dir := t.link, t.token, t.dir
	t.mu.Unlock()
	if link != nil {
		select {
		case <-link.ended:
			link.owned.Wait()
		default:
			return link, nil
		}
	}
	link, err := newPortLink(ctx, dir, token)
	if err != nil {
		return nil, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.life.Err() != nil {
		_ = link.conn.Close() // nothing was said on it
		return nil, net.ErrClosed
	}
	t.link = link
	link.owned.Go(func() { link.serve(t.currentToken) })
	return link, nil
}

func (t *portTransport) currentToken() bootToken {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.token
}

// newPortLink connects to the port and greets the agent.
func newPortLink(ctx context.Context, dir string, token bootToken) (*portLink, error) {
	conn, err := dialUnix(ctx, dir, portSocket)
	if err != nil {
		return nil, fmt.Errorf("cannot reach the guest's port: %w", err)
	}
	l := &portLink{
		conn: conn, reader: bufio.NewReaderSize(conn, 64<<10),
		proved: make(chan net.Conn, maxPortStreams), ended: make(chan struct{}),
	}
	// Closing, not a deadline, ends whatever is under way: nothing else is of use with this connection then.
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	err = l.greet(token)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err == nil {
		l.mux, err = smux.Server(portStream{conn, l.reader}, channelConfig())
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot greet the agent: %w", err), ignoreClosed(conn.Close()))
	}
	return l, nil
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

func channelConfig() *smux.Config {
	return &smux.Config{
		Version: spec.ChannelVersion, KeepAliveDisabled: true, MaxFrameSize: spec.ChannelFrame,
		MaxReceiveBuffer: spec.ChannelBuffer, MaxStreamBuffer: spec.ChannelStreamBuffer,
	}
}

// portStream is the port's byte stream, read through what greeting has buffered.
type portStream struct {
	net.Conn
	reader *bufio.Reader
}

func (s portStream) Read(b []byte) (int, error) { return s.reader.Read(b) }

// greet sends a greeting and reads until its answer.
func (l *portLink) greet(token bootToken) error {
	mark := spec.ChannelMark(token)
	answer := make([]byte, spec.ChannelGreetingLen-spec.ChannelMarkLen)
	if _, err := rand.Read(answer); err != nil {
		return err
	}
	if _, err := l.conn.Write(append(mark[:], answer...)); err != nil {
		return err
	}
	var last []byte
	for range maxStale {
		b, err := l.reader.ReadByte()
		if err != nil {
			return err
		}
		if last = append(last, b); len(last) > len(answer) {
			last = last[1:]
		}
		if bytes.Equal(last, answer) {
			return nil
		}
	}
	return fmt.Errorf("%d bytes came and no answer", maxStale)
}

// serve takes the guest's streams until the link ends.
func (l *portLink) serve(token func() bootToken) {
	defer l.end()
	for {
		stream, err := l.mux.AcceptStream()
		if err != nil {
			return
		}
		conn := &portConn{Stream: stream, link: l}
		if !l.admit() {
			_ = conn.Close() // one too many
			continue
		}
		l.owned.Go(func() { l.prove(conn, token()) })
	}
}

func (l *portLink) admit() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.waiting >= maxPortStreams {
		return false
	}
	l.waiting++
	return true
}

func (l *portLink) took() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.waiting--
}

// prove reads a stream's preface.
func (l *portLink) prove(conn net.Conn, token bootToken) {
	err := conn.SetReadDeadline(time.Now().Add(prefaceTimeout))
	if err == nil {
		err = readPreface(conn, token)
	}
	if err != nil {
		_ = conn.Close() // not the agent's
		l.took()
		return
	}
	l.proved <- conn // there is room: it is among the waiting
}

// end ends the link and every stream of it.
func (l *portLink) end() {
	_ = l.mux.Close() // closes the connection too; an error says that it was closed
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.ended:
	default:
		close(l.ended)
	}
}

// portConn is a stream. Closing one sends a message, for which a guest that does not read makes us wait half a minute.
type portConn struct {
	*smux.Stream
	link *portLink
	once sync.Once
}

// Close implements net.Conn. It does not wait.
func (c *portConn) Close() error {
	c.once.Do(func() {
		_ = c.SetDeadline(time.Unix(1, 0)) // what reads or writes ends now
		go c.Stream.Close()                //nolint:errcheck // ends with the link, if not sooner
	})
	return nil
}
