package vhostvsock

import (
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// owedReset is a reset for a connection that we don't have, or have no more.
type owedReset struct{ guestPort, hostPort uint32 }

// receive fills the guest's receive buffers with what is owed and with the daemon's bytes, one packet or read of each
// connection in turn, and reports whether it left some for the next turn.
func (d *Device) receive() (more bool, err error) {
	q := &d.queues[rxQueue]
	if !q.running() {
		return false, nil
	}
	q.mute()
	for range turnBudget {
		if len(d.resets) == 0 && len(d.ready) == 0 {
			return false, q.notify()
		}
		n, err := d.takeBuffers(1)
		if err != nil {
			return false, err
		}
		if n == 0 {
			// The guest kicks when it has made room; only while something waits for it.
			room, err := q.listen()
			if err != nil {
				return false, fmt.Errorf("the guest's receive ring is broken: %w", err)
			}
			if !room {
				return false, q.notify()
			}
			q.mute()
			continue
		}
		if len(d.resets) > 0 {
			r := d.resets[0]
			d.resets = append(d.resets[:0], d.resets[1:]...)
			d.sendHeader(&header{srcPort: r.hostPort, dstPort: r.guestPort, op: opReset})
			continue
		}
		c := d.ready[0]
		d.ready = append(d.ready[:0], d.ready[1:]...)
		c.queued = false
		if err := d.serveGuest(c); err != nil {
			return false, err
		}
	}
	return true, q.notify()
}

// takeBuffers pops receive buffers until there are n in d.rx[:], or the ring has no more, and returns how many there
// are.
func (d *Device) takeBuffers(n int) (int, error) {
	for d.rxLen < n {
		c := &d.rx[d.rxLen]
		ok, err := d.queues[rxQueue].pop(d.mem, c, true)
		if err == nil && ok && c.len <= headerLen {
			err = fmt.Errorf("a buffer of %d bytes holds no payload", c.len)
		}
		if err != nil {
			return 0, fmt.Errorf("the guest's receive ring is broken: %w", err)
		}
		if !ok {
			break
		}
		d.rxLen++
	}
	return d.rxLen, nil
}

// returnBuffers puts back what takeBuffers took and nobody used.
func (d *Device) returnBuffers() {
	d.queues[rxQueue].unpop(d.rxLen)
	d.rxLen = 0
}

// serveGuest sends what a connection owes: one packet, or one read's worth of data. There is one receive buffer taken.
func (d *Device) serveGuest(c *conn) error {
	defer d.returnBuffers()
	if !c.known() {
		return nil
	}
	h := header{srcPort: d.port, dstPort: c.port, bufAlloc: bufAlloc, fwdCnt: c.forwarded}
	switch {
	case c.owes&oweResponse != 0:
		c.owes &^= oweResponse
		h.op = opResponse
	case c.owes&oweShutdown != 0:
		c.owes &^= oweShutdown
		h.op, h.flags = opShutdown, c.ownShut
	case c.owes&oweCredit != 0:
		c.owes &^= oweCredit
		h.op = opCreditUpdate
	case c.owes&oweCreditRequest != 0:
		c.owes &^= oweCreditRequest
		h.op = opCreditRequest
	default:
		return d.sendData(c, &h)
	}
	c.heard = c.forwarded
	d.sendHeader(&h)
	if c.owes != 0 || c.wantsRead() {
		d.enqueue(c)
	}
	return nil
}

// sendHeader fills the first buffer taken with a packet that has no payload.
func (d *Device) sendHeader(h *header) {
	b := &d.rx[0]
	d.putHeader(b, h)
	d.queues[rxQueue].push(b.head, headerLen)
	// The rest moves up: there is none, for control packets are sent with one buffer taken.
	d.rxLen = 0
}

func (d *Device) putHeader(b *chain, h *header) {
	h.srcCID, h.dstCID, h.kind = hostCID, d.cid, typeStream
	var raw [headerLen]byte
	h.encode(&raw)
	n := 0
	for _, p := range b.parts {
		if n += copy(p, raw[n:]); n == headerLen {
			return
		}
	}
}

// sendData reads from the daemon straight into the guest's receive buffers, one packet to each.
func (d *Device) sendData(c *conn, h *header) error {
	if !c.wantsRead() {
		return nil
	}
	credit := c.credit()
	if credit == 0 {
		if !c.askedCredit {
			c.askedCredit = true
			d.owe(c, oweCreditRequest)
		}
		return nil // its next packet brings us back
	}
	bufs, err := d.takeBuffers(c.rxBatch)
	if err != nil {
		return err
	}
	d.iov = d.iov[:0]
	room := 0
	for i := range bufs {
		d.scratch = append(d.scratch[:0], d.rx[i].parts...)
		for _, p := range skip(d.scratch, headerLen) {
			p = p[:min(len(p), credit-room)]
			if len(p) > 0 {
				d.iov = append(d.iov, p)
				room += len(p)
			}
		}
	}
	n, err := d.read(c)
	if err != nil || n == 0 {
		return err
	}
	d.pushData(c, h, n)
	if n < room {
		// The socket is empty, as far as it matters: what comes later is a new edge.
		c.rxBatch = max(1, c.rxBatch/2)
	} else {
		c.rxBatch = min(maxRxBatch, c.rxBatch*2)
	}
	d.enqueue(c)
	return nil
}

// read fills d.iov from the daemon's socket. It returns 0 when there was nothing, for now or for ever.
func (d *Device) read(c *conn) (int, error) {
	for {
		n, err := unix.Readv(c.fd, d.iov)
		switch err {
		case nil:
			if n > 0 {
				return n, nil
			}
			err = io.EOF
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			c.readable = false
			return 0, nil
		case unix.EFAULT:
			return 0, fmt.Errorf("the guest's receive buffers are gone from its memory")
		}
		// The end, or the daemon closed with bytes unread.
		c.readable = false
		flags := uint32(shutSend)
		if c.hangup || err != io.EOF {
			flags = shutBoth
			c.forwarded = c.received
			c.buf, c.off = nil, 0
		}
		d.shutTowardsGuest(c, flags)
		return 0, nil
	}
}

// pushData hands n bytes, which lie in the buffers taken, to the guest.
func (d *Device) pushData(c *conn, h *header, n int) {
	q := &d.queues[rxQueue]
	h.op = opRW
	used := 0
	for n > 0 {
		b := &d.rx[used]
		used++
		size := min(n, b.len-headerLen)
		h.length = uint32(size)
		d.putHeader(b, h)
		q.push(b.head, headerLen+size)
		c.sent += uint32(size)
		n -= size
	}
	c.heard = c.forwarded
	q.unpop(d.rxLen - used)
	d.rxLen = 0
}
