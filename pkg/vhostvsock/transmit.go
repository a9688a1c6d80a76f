package vhostvsock

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// transmit takes packets from the guest, and reports whether it may have left some for the next turn.
func (d *Device) transmit() (more bool, err error) {
	q := &d.queues[txQueue]
	if !q.running() {
		return false, nil
	}
	q.mute()
	for range turnBudget {
		// Answers wait for the guest to make room; it makes none, it gets no further.
		if len(d.resets) >= maxOwedResets {
			return false, q.notify()
		}
		ok, err := q.pop(d.mem, &d.txChain, false)
		if err != nil {
			return false, fmt.Errorf("the guest's transmit ring is broken: %w", err)
		}
		if !ok {
			if ok, err = q.listen(); err != nil {
				return false, fmt.Errorf("the guest's transmit ring is broken: %w", err)
			}
			if !ok {
				return false, q.notify()
			}
			q.mute()
			continue
		}
		d.packet(d.txChain.parts)
		q.push(d.txChain.head, 0)
	}
	return true, q.notify()
}

// transmitAll takes what the guest's transmit ring holds, before it goes away: last words. Answers are not sent.
func (d *Device) transmitAll() error {
	for range maxQueueSize/turnBudget + 1 {
		if len(d.resets) >= maxOwedResets {
			d.resets = nil
		}
		if _, err := d.transmit(); err != nil {
			return err
		}
	}
	return nil
}

// packet serves one packet of the guest's.
func (d *Device) packet(parts [][]byte) {
	var raw [headerLen]byte
	parts, ok := takeHeader(parts, &raw)
	if !ok {
		return // nobody to answer
	}
	h := decodeHeader(&raw)
	if h.srcCID != d.cid || h.dstCID != hostCID {
		return // forged or not for us: as the kernel's vhost_vsock does
	}
	c := d.byPort[h.srcPort]
	payload, ok := takePayload(parts, &h)
	switch {
	case h.dstPort != d.port || h.kind != typeStream:
		if h.op != opReset {
			d.oweReset(h.srcPort, h.dstPort)
		}
	case c == nil:
		switch h.op {
		case opRequest:
			d.accept(&h)
		case opReset:
		default:
			d.oweReset(h.srcPort, h.dstPort)
		}
	case !ok:
		d.reset(c)
	default:
		d.connPacket(c, &h, payload)
	}
}

// takeHeader copies the header out of the guest's memory, before anything of it is looked at, and returns what follows.
func takeHeader(parts [][]byte, raw *[headerLen]byte) ([][]byte, bool) {
	n := 0
	for n < headerLen {
		if len(parts) == 0 {
			return nil, false
		}
		k := copy(raw[n:], parts[0])
		n += k
		if parts[0] = parts[0][k:]; len(parts[0]) == 0 {
			parts = parts[1:]
		}
	}
	return parts, true
}

// takePayload cuts parts to the length that the header gives.
func takePayload(parts [][]byte, h *header) ([][]byte, bool) {
	if h.length == 0 {
		return nil, true
	}
	if h.op != opRW || h.length > maxPayload {
		return nil, false
	}
	left := int(h.length)
	for i := range parts {
		if len(parts[i]) >= left {
			parts[i] = parts[i][:left]
			return parts[:i+1], true
		}
		left -= len(parts[i])
	}
	return nil, false
}

// connPacket serves a packet of a connection that we have.
func (d *Device) connPacket(c *conn, h *header, payload [][]byte) {
	c.peerAlloc, c.peerForwarded = h.bufAlloc, h.fwdCnt
	if c.credit() > 0 {
		c.askedCredit = false
	}
	if c.readable {
		d.enqueue(c) // it may have had no credit until now
	}
	switch h.op {
	case opRW:
		d.fromGuest(c, payload, h.length)
	case opCreditUpdate:
	case opCreditRequest:
		d.owe(c, oweCredit)
	case opShutdown:
		d.guestShuts(c, h.flags)
	case opReset:
		d.leave(c)
	default: // a second request, a response to nothing, an operation we don't know
		d.reset(c)
	}
}

// fromGuest passes bytes on to the daemon, and keeps what its socket doesn't take.
func (d *Device) fromGuest(c *conn, payload [][]byte, n uint32) {
	if c.guestShut&shutSend != 0 || n > bufAlloc-(c.received-c.forwarded) {
		d.reset(c) // sent after it said that it wouldn't, or more than it was allowed to
		return
	}
	c.received += n
	if c.ownShut&shutReceive != 0 {
		c.forwarded += n // the daemon reads no more
		d.giveCredit(c)
		return
	}
	left := int(n)
	if c.writable && c.buffered() == 0 {
		took := d.write(c, payload)
		if !c.known() || c.ownShut&shutReceive != 0 {
			return
		}
		c.forwarded += uint32(took)
		left -= took
		payload = skip(payload, took)
	}
	if left > 0 {
		if c.off > 0 && len(c.buf)+left > cap(c.buf) {
			c.buf = c.buf[:copy(c.buf, c.buf[c.off:])]
			c.off = 0
		}
		for _, p := range payload {
			c.buf = append(c.buf, p...)
		}
	}
	if c.phase == phaseWaiting {
		d.pair()
	}
	d.giveCredit(c)
}

func skip(parts [][]byte, n int) [][]byte {
	for len(parts) > 0 && n >= len(parts[0]) {
		n -= len(parts[0])
		parts = parts[1:]
	}
	if n > 0 {
		parts[0] = parts[0][n:]
	}
	return parts
}

// giveCredit tells the guest of room once there is enough that it hasn't heard of.
func (d *Device) giveCredit(c *conn) {
	if c.known() && c.forwarded-c.heard >= creditStep {
		d.owe(c, oweCredit)
	}
}

// write writes to the daemon's socket and returns how much it took. If the daemon reads no more, the guest is told and
// what was kept is dropped.
func (d *Device) write(c *conn, parts [][]byte) int {
	for {
		n, err := unix.Writev(c.fd, parts)
		switch err {
		case nil:
			return n
		case unix.EINTR:
			continue
		case unix.EAGAIN:
			c.writable = false
			return 0
		}
		// EPIPE and ECONNRESET from the daemon's end; EFAULT from guest memory that QEMU took away.
		c.forwarded = c.received
		c.buf, c.off = nil, 0
		if c.phase == phaseDraining {
			d.setPhase(c, phaseGone)
			return 0
		}
		d.shutTowardsGuest(c, shutReceive)
		return 0
	}
}

// flush writes what was kept, and carries the guest's half-close once all has gone.
func (d *Device) flush(c *conn) {
	for c.writable && c.fd >= 0 && c.buffered() > 0 {
		d.one[0] = c.buf[c.off:]
		n := d.write(c, d.one[:])
		if c.fd < 0 || c.ownShut&shutReceive != 0 {
			return
		}
		c.off += n
		c.forwarded += uint32(n)
		if c.buffered() == 0 {
			c.buf, c.off = c.buf[:0], 0
		}
	}
	if c.fd < 0 || c.buffered() > 0 {
		d.giveCredit(c)
		return
	}
	if c.phase == phaseDraining {
		d.setPhase(c, phaseGone)
		return
	}
	if c.guestShut&shutSend != 0 && !c.shutDone {
		c.shutDone = true
		_ = unix.Shutdown(c.fd, unix.SHUT_WR)
	}
	d.giveCredit(c)
}

// guestShuts is the guest's half-close, or, with both flags seen, its close.
func (d *Device) guestShuts(c *conn, flags uint32) {
	c.guestShut |= flags & shutBoth
	if c.guestShut == shutBoth {
		d.oweReset(c.port, d.port)
		d.leave(c)
		return
	}
	if c.fd < 0 {
		return
	}
	if c.guestShut&shutReceive != 0 {
		_ = unix.Shutdown(c.fd, unix.SHUT_RD)
	}
	d.flush(c)
}
