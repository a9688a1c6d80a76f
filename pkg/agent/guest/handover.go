package guest

import (
	"context"
	"errors"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// handoverWait bounds the time between descriptors and the Exec that they are for, whichever comes first.
	handoverWait = 30 * time.Second
	// handoverHello bounds the time a connection may take to say what it is.
	handoverHello = 10 * time.Second
	// acceptPause is the time between two tries to accept a connection that there is no room for.
	acceptPause = 50 * time.Millisecond
)

// handover keeps descriptors that the daemon handed over until the process they are for is started.
type handover struct {
	mu      sync.Mutex // guards what follows
	parcels map[string]*parcel
}

// parcel is what is handed over for one process, or awaited.
type parcel struct {
	here  chan struct{} // closed when files is set
	files []*os.File
}

// parcelLocked is the parcel for a process; nil if there are too many.
func (h *handover) parcelLocked(id string) *parcel {
	p := h.parcels[id]
	if p == nil && len(h.parcels) < maxProcesses {
		p = &parcel{here: make(chan struct{})}
		if h.parcels == nil {
			h.parcels = map[string]*parcel{}
		}
		h.parcels[id] = p
	}
	return p
}

// put takes over files. What is there already, or is not taken in time, is closed.
func (h *handover) put(id string, files []*os.File) {
	h.mu.Lock()
	defer h.mu.Unlock()
	p := h.parcelLocked(id)
	if p == nil || p.files != nil {
		closeAll(files)
		return
	}
	p.files = files
	close(p.here)
	time.AfterFunc(handoverWait, func() { closeAll(h.drop(id, p)) })
}

// drop forgets a parcel and answers with what was in it, unless it was forgotten before.
func (h *handover) drop(id string, p *parcel) []*os.File {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.parcels[id] != p {
		return nil
	}
	delete(h.parcels, id)
	return p.files
}

var errNotHanded = errors.New("no descriptors were handed over for the process")

// take answers with what was handed over for a process, waiting for it. The caller closes them.
func (h *handover) take(id string) ([]*os.File, error) {
	h.mu.Lock()
	p := h.parcelLocked(id)
	h.mu.Unlock()
	if p == nil {
		return nil, exhausted("the agent waits for %d handovers already", maxProcesses)
	}
	late := time.NewTimer(handoverWait)
	defer late.Stop()
	select {
	case <-p.here:
	case <-late.C:
	}
	files := h.drop(id, p)
	if files == nil {
		return nil, errNotHanded
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// sortingListener hands on the connections that are for calls, and keeps those that hand descriptors over.
type sortingListener struct {
	net.Listener
	handover *handover
	calls    chan net.Conn
	failed   chan struct{} // closed when err is set
	err      error
	ctx      context.Context
	cancel   context.CancelFunc
	owned    sync.WaitGroup
}

// newSortingListener takes over l; Close waits for its goroutines.
func newSortingListener(l net.Listener, h *handover) *sortingListener {
	s := &sortingListener{Listener: l, handover: h, calls: make(chan net.Conn), failed: make(chan struct{})}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.owned.Go(func() {
		defer close(s.failed)
		for {
			conn, err := l.Accept()
			switch {
			case err == nil:
				s.owned.Go(func() { s.sort(conn) })
			case !passes(err) || !s.pause():
				s.err = err
				return
			}
		}
	})
	return s
}

// passes: a connection that was given up, and a shortage, are no end of a listener.
func passes(err error) bool {
	return errors.Is(err, unix.ECONNABORTED) || errors.Is(err, unix.EMFILE) || errors.Is(err, unix.ENFILE) ||
		errors.Is(err, unix.ENOMEM) || errors.Is(err, unix.ENOBUFS)
}

// pause waits before the next try; false if there is none.
func (s *sortingListener) pause() bool {
	select {
	case <-time.After(acceptPause):
		return true
	case <-s.ctx.Done():
		return false
	}
}

// Accept implements net.Listener.
func (s *sortingListener) Accept() (net.Conn, error) {
	select {
	case conn := <-s.calls:
		return conn, nil
	case <-s.failed:
		return nil, s.err
	}
}

// Close implements net.Listener.
func (s *sortingListener) Close() error {
	err := s.Listener.Close()
	s.cancel()
	s.owned.Wait()
	return err
}

func (s *sortingListener) sort(conn net.Conn) {
	if socket, ok := conn.(*net.UnixConn); ok {
		if err := socket.SetReadDeadline(time.Now().Add(handoverHello)); err != nil {
			conn.Close()
			return
		}
		stop := context.AfterFunc(s.ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })
		first, err := peek(socket)
		stop()
		if err == nil && first == spec.HandoverMark {
			if id, files := receiveHandover(socket); id != "" {
				s.handover.put(id, files)
			}
			conn.Close()
			return
		}
		// Without a word it may still come to calls.
		if err := socket.SetReadDeadline(time.Time{}); err != nil {
			conn.Close()
			return
		}
	}
	select {
	case s.calls <- conn:
	case <-s.ctx.Done():
		conn.Close()
	}
}

// peek answers with the first byte that came, and leaves it there.
func peek(conn *net.UnixConn) (byte, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var first [1]byte
	var failed error
	err = raw.Read(func(fd uintptr) bool {
		_, failed = ignoringEINTR(func() (int, error) {
			n, _, err := unix.Recvfrom(int(fd), first[:], unix.MSG_PEEK)
			return n, err
		})
		return !errors.Is(failed, unix.EAGAIN)
	})
	return first[0], errors.Join(err, failed)
}

// receiveHandover reads the one message of a connection that hands over; the id is empty if it is none.
func receiveHandover(conn *net.UnixConn) (id string, files []*os.File) {
	message := make([]byte, 1+maxIDLen+1)
	control := make([]byte, unix.CmsgSpace(spec.HandoverDescriptors*4))
	n, controlLen, flags, _, err := conn.ReadMsgUnix(message, control)
	if err != nil {
		return "", nil
	}
	id, ok := handoverID(message[:n])
	fds, _ := passedDescriptors(control[:controlLen]) // what can't be read is missing below
	for _, fd := range fds {
		files = append(files, os.NewFile(uintptr(fd), "output"))
	}
	if !ok || len(files) != spec.HandoverDescriptors || flags&(unix.MSG_CTRUNC|unix.MSG_TRUNC) != 0 {
		closeAll(files)
		return "", nil
	}
	return id, files
}

// handoverID is the id that a message is for.
func handoverID(message []byte) (string, bool) {
	if len(message) < 2 || message[0] != spec.HandoverMark || len(message) > 1+maxIDLen {
		return "", false
	}
	return string(message[1:]), true
}
