package vhostvsock

import (
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// phase is how far a connection has come.
//
//	REQUEST from the guest          its first byte, and the daemon connects
//	──────────────────────▶ phaseWaiting ──────────────────────▶ phaseJoined
//	                          │ the guest resets or shuts both        │      │ both directions shut towards the guest:
//	                          ▼                                       │      ▼ it has closeTimeout to reset
//	                      phaseGone ◀──────────────────────────────┐  │  phaseClosing ──▶ phaseGone
//	                          ▲            the guest resets or     │  ▼
//	                          └──────── phaseDraining ◀──── shuts both, and bytes for the daemon are left
//	                             all written, or the daemon gone
//
// Only setPhase assigns it.
type phase uint8

const (
	phaseWaiting  phase = iota // accepted, its bytes kept in buf; in Device.waitingGuest
	phaseJoined                // fd is the daemon's
	phaseClosing               // as joined, and deadline is set
	phaseDraining              // unknown to the guest; fd and buf remain
	phaseGone                  // fd closed, in no list
)

// conn is one connection of the guest's.
type conn struct {
	id    int32 // of its epoll events, never used twice while it may still have some
	port  uint32
	phase phase
	fd    int // the daemon's socket, -1 before it is joined

	// Bytes from the guest that the daemon's socket didn't take yet: buf[off:], at most bufAlloc.
	buf []byte
	off int
	// What the edge-triggered epoll said, until a call said otherwise.
	readable, writable bool
	// The daemon's socket was shut or closed altogether.
	hangup bool

	// The guest's credit: what it sent and what of it went on to the daemon. heard is the forwarded count in the last
	// packet that the guest got from us.
	received, forwarded, heard uint32
	// Our credit: what the guest said last, and what we sent.
	peerAlloc, peerForwarded, sent uint32
	// We asked for credit and have had no packet since.
	askedCredit bool

	guestShut uint32 // shutReceive, shutSend: what the guest said
	ownShut   uint32 // what we told, or owe, the guest
	shutDone  bool   // the socket was shut for writing after the guest's shutSend

	owes   owed
	queued bool // in Device.ready

	rxBatch  int // receive buffers to try next time
	deadline time.Time
}

// owed is what is to be sent to the guest besides data.
type owed uint8

const (
	oweResponse owed = 1 << iota
	oweShutdown
	oweCredit
	oweCreditRequest
)

func (c *conn) buffered() int { return len(c.buf) - c.off }

// credit is how much the guest can take. A guest that says nonsense gets nothing.
func (c *conn) credit() int {
	under := c.sent - c.peerForwarded
	if under > c.peerAlloc {
		return 0
	}
	return int(c.peerAlloc - under)
}

// known reports whether the guest knows the connection.
func (c *conn) known() bool { return c.phase < phaseDraining }

// wantsRead reports whether bytes of the daemon's would be passed on now.
func (c *conn) wantsRead() bool {
	return c.readable && c.known() && c.fd >= 0 && c.guestShut&shutReceive == 0 && c.ownShut&shutSend == 0
}

// setPhase is the one place where a connection changes its phase.
func (d *Device) setPhase(c *conn, p phase) {
	if c.known() && p >= phaseDraining {
		delete(d.byPort, c.port)
		c.owes = 0
	}
	switch c.phase {
	case phaseWaiting:
		d.waitingGuest = remove(d.waitingGuest, c)
	case phaseClosing:
		d.closing = remove(d.closing, c)
	}
	switch p {
	case phaseClosing:
		c.deadline = time.Now().Add(closeTimeout)
		d.closing = append(d.closing, c)
	case phaseGone:
		_ = closeFD(c.fd)
		c.fd, c.buf, c.off = -1, nil, 0
		delete(d.byID, c.id)
		if c.queued {
			// Else a guest that opens and resets, and makes no room, would fill the list.
			d.ready = remove(d.ready, c)
		}
	}
	c.phase = p
}

func remove[T comparable](s []T, v T) []T {
	for i := range s {
		if s[i] == v {
			return append(s[:i], s[i+1:]...)
		}
	}
	return s
}

// accept takes a guest's request, or owes it a reset.
func (d *Device) accept(h *header) {
	if len(d.byID) >= maxConns || len(d.waitingGuest) >= maxWaitingGuest {
		d.oweReset(h.srcPort, h.dstPort)
		return
	}
	c := &conn{
		id: d.newID(), port: h.srcPort, fd: -1, peerAlloc: h.bufAlloc, peerForwarded: h.fwdCnt, rxBatch: 1,
	}
	d.byID[c.id] = c
	d.byPort[c.port] = c
	d.waitingGuest = append(d.waitingGuest, c)
	d.owe(c, oweResponse)
}

// newID skips ids in use, of which there are few.
func (d *Device) newID() int32 {
	for {
		d.lastID++
		if d.lastID < 0 {
			d.lastID = 1
		}
		if d.byID[d.lastID] == nil && d.hostByID(d.lastID) < 0 {
			return d.lastID
		}
	}
}

// pair joins the oldest of either side. A connection of the guest's on which nothing came yet is left out: it could be
// kept from speaking so that the daemon waits for it while others wait for the daemon.
func (d *Device) pair() {
	for len(d.waitingHost) > 0 {
		i := slices.IndexFunc(d.waitingGuest, func(c *conn) bool { return c.received > 0 })
		if i < 0 {
			return
		}
		c, h := d.waitingGuest[i], d.waitingHost[0]
		d.waitingHost = remove(d.waitingHost, h)
		if closed(h.fd) { // and the epoll hasn't told us yet
			_ = unix.Close(h.fd)
			continue
		}
		c.fd = h.fd
		if c.guestShut&shutReceive != 0 {
			_ = unix.Shutdown(c.fd, unix.SHUT_RD)
		}
		d.setPhase(c, phaseJoined)
		if err := d.rewatch(c.fd, watchConn, c.id, unix.EPOLLIN|unix.EPOLLOUT|unix.EPOLLRDHUP); err != nil {
			d.reset(c)
		}
	}
}

// closed reports whether the daemon has shut or closed its end.
func closed(fd int) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLRDHUP}}
	n, err := unix.Poll(p, 0)
	return err == nil && n > 0
}

// owe notes that the guest is to get a packet of the connection.
func (d *Device) owe(c *conn, what owed) {
	c.owes |= what
	d.enqueue(c)
}

// enqueue puts a connection among those that have something for the guest.
func (d *Device) enqueue(c *conn) {
	if !c.queued {
		c.queued = true
		d.ready = append(d.ready, c)
	}
}

// oweReset notes a reset for a connection that we don't have.
func (d *Device) oweReset(guestPort, hostPort uint32) {
	d.resets = append(d.resets, owedReset{guestPort, hostPort})
}

// reset ends a connection from our side.
func (d *Device) reset(c *conn) {
	if c.known() {
		d.oweReset(c.port, d.port)
	}
	d.setPhase(c, phaseGone)
}

// leave is the guest's end of a connection: what it sent before still goes to the daemon.
func (d *Device) leave(c *conn) {
	if c.fd >= 0 && c.buffered() > 0 && c.ownShut&shutReceive == 0 {
		c.guestShut = shutBoth
		d.setPhase(c, phaseDraining)
		return
	}
	d.setPhase(c, phaseGone)
}

// shutTowardsGuest notes that the daemon's side will send, or receive, no more.
func (d *Device) shutTowardsGuest(c *conn, flags uint32) {
	if !c.known() || c.ownShut|flags == c.ownShut {
		return
	}
	c.ownShut |= flags
	d.owe(c, oweShutdown)
	if c.ownShut == shutBoth && c.phase == phaseJoined {
		d.setPhase(c, phaseClosing)
	}
}

// forgetConns drops every connection that the guest knew, because it knows them no more.
func (d *Device) forgetConns() {
	for _, c := range d.byPort {
		d.leave(c)
	}
	d.resets = nil
}

// expire resets connections that the guest should have reset long ago.
func (d *Device) expire() {
	for len(d.closing) > 0 && time.Until(d.closing[0].deadline) <= 0 {
		d.reset(d.closing[0])
	}
}

// timeout is how long an epoll may wait before expire has something to do: milliseconds, -1 for ever.
func (d *Device) timeout() int {
	if len(d.closing) == 0 {
		return -1
	}
	return milliseconds(time.Until(d.closing[0].deadline))
}

// milliseconds rounds up, for an epoll that woke too early would only wait again.
func milliseconds(t time.Duration) int { return int(max(t, 0)/time.Millisecond) + 1 }
