package microvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"github.com/mdlayher/vsock"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

const (
	vhostVsockDevice = "/dev/vhost-vsock"
	// The port that guests dial, one for all of them: the first free one of these, downwards. Below 1024, so that only
	// root can have taken it: a guest's token is for us alone.
	firstHubPort = 1023
	lastHubPort  = 512
	hubPortFile  = "vsock-port"
	// How long a daemon's port may still be held when the next daemon wants it: the one before is on its way out.
	hubPortPatience = 5 * time.Second
	hubPortPause    = 50 * time.Millisecond

	// Context IDs of guests: drawn from this range, for a new guest should not get what was meant for an older one. 0 to 2
	// have a meaning, 2^32-1 too, and people who set CIDs by hand use small ones.
	minCID = 1 << 16
	maxCID = 1<<31 - 1
	// How many that are taken it takes to give up.
	maxCIDTries = 64

	// Connections of one guest that wait for a Dial or to be proved.
	maxWaitingPerVM = 16
	// Of all guests.
	maxWaitingAll = 1024
	// How long accepting rests when the daemon is out of descriptors or memory.
	acceptPause = 100 * time.Millisecond

	// _IOW(VHOST_VIRTIO=0xaf, 0x60, __u64) of linux/vhost.h; golang.org/x/sys has no name for it.
	ioctlVhostVsockSetGuestCID = 0x4008af60
)

// kernelHub listens to the host kernel's vsock for all guests of one daemon. It knows a guest by its context ID, which
// the kernel vouches for, and lets a connection wait for its VM's Dial once its preface has proved the boot.
type kernelHub struct {
	port     uint32
	listener *vsock.Listener
	log      *zap.Logger

	mu sync.Mutex
	// By CID. Guarded by mu.
	guests map[uint32]*kernelTransport
	// Connections that wait, of all guests. Guarded by mu.
	waiting int
	closed  bool // guarded by mu

	// The accept loop and one goroutine per connection being proved; Close waits for them.
	owned sync.WaitGroup
}

// newKernelHub fails where the host can't carry vsock for guests; the error says why.
func newKernelHub(stateDir string, log *zap.Logger) (*kernelHub, error) {
	dev, err := os.OpenFile(vhostVsockDevice, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot use the kernel's vsock (modprobe vhost_vsock): %w", err)
	}
	if err := dev.Close(); err != nil {
		return nil, fmt.Errorf("cannot use the kernel's vsock: %w", err)
	}
	listener, port, err := listenHub(filepath.Join(stateDir, hubPortFile))
	if err != nil {
		return nil, err
	}
	h := &kernelHub{port: port, listener: listener, log: log, guests: map[uint32]*kernelTransport{}}
	h.owned.Go(h.serve)
	return h, nil
}

// listenHub listens on the port that the file names, or on a free one, which it writes there: guests that an earlier
// daemon started dial that port for as long as they live.
func listenHub(file string) (*vsock.Listener, uint32, error) {
	b, err := wholefile.Read(file, 16)
	if err == nil {
		port, err := strconv.ParseUint(strings.TrimSpace(string(b)), 10, 32)
		if err != nil || port < lastHubPort || port > firstHubPort {
			return nil, 0, fmt.Errorf("cannot listen for guests: %s should hold a port and holds %q", file, b)
		}
		l, err := listenAgain(uint32(port))
		return l, uint32(port), err
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("cannot listen for guests: %w", err)
	}
	for port := uint32(firstHubPort); port >= lastHubPort; port-- {
		// Any context ID: a listener on the host's own would miss guests once the host is a guest itself.
		l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
		if errors.Is(err, unix.EADDRINUSE) {
			continue
		}
		if err != nil {
			return nil, 0, fmt.Errorf("cannot listen on vsock port %d: %w", port, err)
		}
		if err := writeFileAtomic(file, strconv.AppendUint(nil, uint64(port), 10), 0o600); err != nil {
			return nil, 0, errors.Join(fmt.Errorf("cannot keep the vsock port: %w", err), l.Close())
		}
		return l, port, nil
	}
	return nil, 0, fmt.Errorf("cannot listen for guests: vsock ports %d to %d are all taken", lastHubPort, firstHubPort)
}

func listenAgain(port uint32) (*vsock.Listener, error) {
	for end := time.Now().Add(hubPortPatience); ; time.Sleep(hubPortPause) {
		l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
		if err == nil {
			return l, nil
		}
		if !errors.Is(err, unix.EADDRINUSE) || time.Now().After(end) {
			return nil, fmt.Errorf("cannot listen on vsock port %d, which running guests dial: %w", port, err)
		}
	}
}

// newTransport reserves a context ID. The kernel frees it when the last descriptor of the device is closed: with QEMU.
func (h *kernelHub) newTransport(token bootToken) (transport, transportFiles, error) {
	dev, err := os.OpenFile(vhostVsockDevice, os.O_RDWR, 0)
	if err != nil {
		return nil, transportFiles{}, fmt.Errorf("cannot make a vsock device: %w", err)
	}
	for range maxCIDTries {
		cid := minCID + rand.Uint32N(maxCID-minCID)
		err = setGuestCID(dev, cid)
		if errors.Is(err, unix.EADDRINUSE) {
			continue
		}
		var t *kernelTransport
		if err == nil {
			t, err = h.add(transportRecord{Name: transportKernel, CID: cid, Port: h.port}, token)
		}
		if err != nil {
			break
		}
		return t, transportFiles{QEMU: dev}, nil
	}
	return nil, transportFiles{}, errors.Join(fmt.Errorf("cannot reserve a vsock context ID: %w", err), dev.Close())
}

func setGuestCID(dev *os.File, cid uint32) error {
	conn, err := dev.SyscallConn()
	if err != nil {
		return err
	}
	var ioctlErr error
	value := uint64(cid)
	err = conn.Control(func(fd uintptr) {
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, fd, ioctlVhostVsockSetGuestCID, uintptr(unsafe.Pointer(&value)))
		if errno != 0 {
			ioctlErr = errno
		}
	})
	return errors.Join(err, ioctlErr)
}

func (h *kernelHub) attach(rec transportRecord, token bootToken) (transport, error) {
	if rec.Port != h.port {
		return nil, fmt.Errorf("cannot reach a guest that dials vsock port %d: this daemon listens on %d", rec.Port, h.port)
	}
	return h.add(rec, token)
}

func (h *kernelHub) add(rec transportRecord, token bootToken) (*kernelTransport, error) {
	t := &kernelTransport{
		hub: h, record: rec, token: token,
		proved: make(chan net.Conn, maxWaitingPerVM), closed: make(chan struct{}),
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.closed {
		return nil, net.ErrClosed
	}
	if h.guests[rec.CID] != nil {
		return nil, fmt.Errorf("cannot serve vsock context ID %d twice", rec.CID)
	}
	h.guests[rec.CID] = t
	return t, nil
}

// Close ends the listening and every transport of the hub.
func (h *kernelHub) Close() error {
	h.mu.Lock()
	h.closed = true
	var guests []*kernelTransport
	for _, t := range h.guests {
		guests = append(guests, t)
	}
	h.mu.Unlock()
	err := h.listener.Close()
	if errors.Is(err, net.ErrClosed) {
		err = nil
	}
	for _, t := range guests {
		err = errors.Join(err, t.Close())
	}
	h.owned.Wait()
	return err
}

// serve accepts until the listener is closed.
func (h *kernelHub) serve() {
	for {
		conn, err := h.listener.Accept()
		if err != nil {
			h.mu.Lock()
			closed := h.closed
			h.mu.Unlock()
			if closed {
				return
			}
			h.log.Warn("cannot accept a guest's connection", zap.Error(err))
			time.Sleep(acceptPause)
			continue
		}
		t := h.admit(conn)
		if t == nil {
			_ = conn.Close() // nothing was said on it
			continue
		}
		h.owned.Go(func() { t.prove(conn) })
	}
}

// admit finds the guest that dials, and counts the connection. Nil: it is nobody's, or one too many. Processes of the
// host itself come as context ID 1 or 2, which no guest has.
func (h *kernelHub) admit(conn net.Conn) *kernelTransport {
	addr, ok := conn.RemoteAddr().(*vsock.Addr)
	if !ok {
		return nil
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	t := h.guests[addr.ContextID]
	// The first of a guest is always let in: others' crowds must not shut it off.
	if t == nil || len(t.waiting) >= maxWaitingPerVM || h.waiting >= maxWaitingAll && len(t.waiting) > 0 {
		return nil
	}
	t.hold(conn)
	return t
}

// kernelTransport is one guest's place in the hub.
type kernelTransport struct {
	hub    *kernelHub
	record transportRecord

	token bootToken // guarded by hub.mu: zero until a clone was adopted

	// Every connection that waits, proved or not, so that Close can end it. Guarded by hub.mu.
	waiting map[net.Conn]struct{}
	// Those that are proved. It never blocks: it holds as many as may wait.
	proved chan net.Conn
	// Closed by Close, guarded by hub.mu.
	closed chan struct{}
}

// hold counts a connection as waiting; hub.mu is held.
func (t *kernelTransport) hold(conn net.Conn) {
	if t.waiting == nil {
		t.waiting = map[net.Conn]struct{}{}
	}
	t.waiting[conn] = struct{}{}
	t.hub.waiting++
}

// release takes a connection out of the waiting ones; false if Close did already.
func (t *kernelTransport) release(conn net.Conn) bool {
	t.hub.mu.Lock()
	defer t.hub.mu.Unlock()
	if _, ok := t.waiting[conn]; !ok {
		return false
	}
	delete(t.waiting, conn)
	t.hub.waiting--
	return true
}

// prove reads the preface of a connection that was admitted.
func (t *kernelTransport) prove(conn net.Conn) {
	err := conn.SetReadDeadline(time.Now().Add(prefaceTimeout))
	if err == nil {
		err = readPreface(conn, t.currentToken())
	}
	if err != nil {
		if t.release(conn) {
			t.hub.log.Debug("a guest's connection is not its agent's", zap.Uint32("cid", t.record.CID), zap.Error(err))
		}
		_ = conn.Close() // nothing was said on it
		return
	}
	// There is room: every connection in the channel is among the waiting.
	t.proved <- conn
}

// adopted implements adopter.
func (t *kernelTransport) adopted(token bootToken) {
	t.hub.mu.Lock()
	defer t.hub.mu.Unlock()
	t.token = token
}

func (t *kernelTransport) currentToken() bootToken {
	t.hub.mu.Lock()
	defer t.hub.mu.Unlock()
	return t.token
}

func (t *kernelTransport) Record() transportRecord { return t.record }

// Dial takes the oldest connection of the guest's agent that is still open.
func (t *kernelTransport) Dial(ctx context.Context) (net.Conn, error) {
	for {
		select {
		case <-t.closed:
			return nil, net.ErrClosed
		default:
		}
		select {
		case conn := <-t.proved:
			if t.release(conn) && isOpen(conn) {
				return conn, nil
			}
			_ = conn.Close() // the guest hung up while it waited
		case <-t.closed:
			return nil, net.ErrClosed
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// isOpen reports whether the other end of a connection has neither shut nor closed it.
func isOpen(conn net.Conn) bool {
	sys, ok := conn.(syscall.Conn)
	if !ok {
		return false
	}
	raw, err := sys.SyscallConn()
	if err != nil {
		return false
	}
	var n int
	pollErr := error(unix.EINTR)
	err = raw.Control(func(fd uintptr) {
		for errors.Is(pollErr, unix.EINTR) {
			n, pollErr = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}, 0)
		}
	})
	return err == nil && pollErr == nil && n == 0
}

func (t *kernelTransport) Close() error {
	t.hub.mu.Lock()
	defer t.hub.mu.Unlock()
	select {
	case <-t.closed:
		return nil
	default:
	}
	close(t.closed)
	if t.hub.guests[t.record.CID] == t {
		delete(t.hub.guests, t.record.CID)
	}
	for conn := range t.waiting {
		_ = conn.Close() // nothing was said on it; also ends a prove that reads
		delete(t.waiting, conn)
		t.hub.waiting--
	}
	return nil
}
