package vhostvsock

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"
)

// Config is what a Device serves.
type Config struct {
	// The guest's context ID, and the port at CID 2 that it may connect to.
	CID, Port uint32
	// The connected vhost-user socket, whose other end QEMU has.
	Control *os.File
	// The listening Unix stream socket that the daemon connects to.
	Listener *os.File
}

// Device is the back end of one guest's vsock device. Its methods are for one goroutine.
type Device struct {
	cid      uint64
	port     uint32
	control  int
	listener int
	epoll    int
	reader   messageReader

	// vhost-user's negotiated features.
	protocol uint64
	mem      *guestMemory // nil until QEMU sent it
	queues   [numQueues]queue

	byID         map[int32]*conn  // every connection
	byPort       map[uint32]*conn // those the guest knows, by its port
	waitingGuest []*conn          // in phaseWaiting, oldest first
	waitingHost  []hostConn       // the daemon's, oldest first
	closing      []*conn          // in phaseClosing, by deadline
	ready        []*conn          // with something for the guest, at most once each
	resets       []owedReset
	lastID       int32
	// The listener may have a connection for us.
	acceptable bool

	txChain chain
	rx      [maxRxBatch]chain // receive buffers taken: rx[:rxLen]
	rxLen   int
	iov     [][]byte
	scratch [][]byte
	one     [1][]byte
}

// hostConn is a connection of the daemon's that waits for one of the guest's.
type hostConn struct {
	id int32
	fd int
}

// What an epoll event is about: its Pad. Its Fd says which.
const (
	watchControl  int32 = iota
	watchListener       // of the daemon's
	watchKick           // Fd is the queue
	watchHost           // Fd is a hostConn's id
	watchConn           // Fd is a conn's id
)

// Serve serves a device until QEMU closes its end; then it returns nil. The files stay the caller's.
func Serve(c Config) (err error) {
	d, err := newDevice(c)
	if err != nil {
		return err
	}
	defer d.destroy()
	// Guest memory can shrink under our hands if QEMU wants it to. That is QEMU's fault, not ours.
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			fault, ok := r.(interface{ Addr() uintptr })
			if !ok {
				panic(r)
			}
			err = fmt.Errorf("guest memory is gone at %#x", fault.Addr())
		}
	}()
	if err := d.serve(); !errors.Is(err, errEOF) {
		return err
	}
	return d.drain()
}

func newDevice(c Config) (*Device, error) {
	d := &Device{
		cid: uint64(c.CID), port: c.Port,
		control: int(c.Control.Fd()), listener: int(c.Listener.Fd()),
		byID: map[int32]*conn{}, byPort: map[uint32]*conn{},
	}
	d.reader.fd = d.control
	for i := range d.queues {
		d.queues[i] = newQueue()
	}
	var err error
	if d.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("cannot create an epoll: %w", err)
	}
	for _, w := range []struct {
		fd   int
		what int32
	}{{d.control, watchControl}, {d.listener, watchListener}} {
		err := unix.SetNonblock(w.fd, true)
		if err == nil {
			err = d.watch(w.fd, w.what, 0, unix.EPOLLIN)
		}
		if err != nil {
			d.destroy()
			return nil, fmt.Errorf("cannot watch descriptor %d: %w", w.fd, err)
		}
	}
	return d, nil
}

// destroy frees everything but the caller's files.
func (d *Device) destroy() {
	for _, c := range d.byID {
		d.setPhase(c, phaseGone)
	}
	for _, h := range d.waitingHost {
		_ = unix.Close(h.fd)
	}
	for i := range d.queues {
		q := &d.queues[i]
		d.dropKick(q)
		_ = closeFD(q.call)
		_ = q.resolve(nil) // of nothing, which can't fail
	}
	if d.mem != nil {
		d.mem.unmap()
	}
	d.reader.close()
	_ = unix.Close(d.epoll)
}

func (d *Device) watch(fd int, what, id int32, events uint32) error {
	return d.epollCtl(unix.EPOLL_CTL_ADD, fd, what, id, events)
}

func (d *Device) rewatch(fd int, what, id int32, events uint32) error {
	return d.epollCtl(unix.EPOLL_CTL_MOD, fd, what, id, events)
}

// epollCtl watches edges: a connection whose bytes can't be passed on now needs no call to be left alone.
func (d *Device) epollCtl(op, fd int, what, id int32, events uint32) error {
	return unix.EpollCtl(d.epoll, op, fd, &unix.EpollEvent{Events: events | unix.EPOLLET, Fd: id, Pad: what})
}

// serve is the loop. It ends with an error, errEOF when QEMU is gone.
func (d *Device) serve() error {
	var events [64]unix.EpollEvent
	more := false
	for {
		if err := d.wait(events[:], more); err != nil {
			return err
		}
		var err error
		if more, err = d.turn(); err != nil {
			return err
		}
	}
}

// wait notes what happened since the last wait. It doesn't block if there is more to do.
func (d *Device) wait(events []unix.EpollEvent, more bool) error {
	timeout := d.timeout()
	if more {
		timeout = 0
	}
	n, err := unix.EpollWait(d.epoll, events, timeout)
	if err != nil && err != unix.EINTR {
		return fmt.Errorf("cannot wait for events: %w", err)
	}
	control := false
	for _, e := range events[:max(n, 0)] {
		switch e.Pad {
		case watchControl:
			control = true
		case watchListener:
			d.acceptable = true
		case watchHost:
			d.dropHost(e.Fd)
		case watchConn:
			d.noteConn(e.Fd, e.Events)
		}
	}
	// Last: a message may take away what other events are about.
	if control {
		return d.messages()
	}
	return nil
}

// turn does what can be done without waiting, and reports whether it left something.
func (d *Device) turn() (bool, error) {
	d.expire()
	d.acceptHosts()
	moreTx, err := d.transmit()
	if err != nil {
		return false, err
	}
	held := len(d.resets) >= maxOwedResets
	moreRx, err := d.receive()
	if err != nil {
		return false, err
	}
	return moreTx || moreRx || held && len(d.resets) < maxOwedResets, nil
}

// messages serves what QEMU sent.
func (d *Device) messages() error {
	for {
		m, err := d.reader.next()
		if err == unix.EAGAIN {
			return nil
		}
		if err != nil {
			return err
		}
		if err := d.handleMessage(m); err != nil {
			return err
		}
	}
}

// noteConn notes what the epoll says of a connection.
func (d *Device) noteConn(id int32, events uint32) {
	c := d.byID[id]
	if c == nil {
		return // gone since
	}
	if events&(unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		c.hangup = true
	}
	if events&(unix.EPOLLIN|unix.EPOLLRDHUP|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		c.readable = true
		d.enqueue(c)
	}
	if events&(unix.EPOLLOUT|unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		c.writable = true
		d.flush(c)
	}
	if c.hangup && c.known() && c.ownShut&shutSend != 0 {
		d.shutTowardsGuest(c, shutBoth)
	}
}

// acceptHosts takes connections of the daemon's, as many as may wait.
func (d *Device) acceptHosts() {
	for d.acceptable && len(d.waitingHost) < maxWaitingHost {
		fd, _, err := unix.Accept4(d.listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err == unix.EINTR || err == unix.ECONNABORTED {
			continue
		}
		if err != nil {
			// EAGAIN, or descriptors are short: the next connection tries again.
			d.acceptable = false
			return
		}
		h := hostConn{id: d.newID(), fd: fd}
		if err := d.watch(fd, watchHost, h.id, unix.EPOLLRDHUP); err != nil {
			_ = unix.Close(fd)
			continue
		}
		d.waitingHost = append(d.waitingHost, h)
		d.pair()
	}
}

func (d *Device) hostByID(id int32) int {
	for i := range d.waitingHost {
		if d.waitingHost[i].id == id {
			return i
		}
	}
	return -1
}

// dropHost forgets a connection that the daemon closed while it waited.
func (d *Device) dropHost(id int32) {
	i := d.hostByID(id)
	if i < 0 {
		return // joined since
	}
	_ = unix.Close(d.waitingHost[i].fd)
	d.waitingHost = append(d.waitingHost[:i], d.waitingHost[i+1:]...)
}

// drain gives the daemon what the guest had sent before QEMU went, its last words included.
func (d *Device) drain() error {
	if err := d.transmitAll(); err != nil {
		return err
	}
	d.forgetConns()
	var events [64]unix.EpollEvent
	for end := time.Now().Add(drainTimeout); len(d.byID) > 0; {
		left := time.Until(end)
		if left <= 0 {
			return fmt.Errorf("the guest is gone and the daemon did not read its last bytes in %v", drainTimeout)
		}
		n, err := unix.EpollWait(d.epoll, events[:], milliseconds(left))
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("cannot wait for events: %w", err)
		}
		for _, e := range events[:max(n, 0)] {
			if e.Pad == watchConn {
				d.noteConn(e.Fd, e.Events)
			}
		}
	}
	return nil
}
