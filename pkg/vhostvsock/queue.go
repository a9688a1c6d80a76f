package vhostvsock

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Flags of descriptors and rings (virtio 1.2, 2.7.5 to 2.7.8).
const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4
	descLen      = 16

	availNoInterrupt = 1
	usedNoNotify     = 1

	usedElemLen = 8
)

// queue is the device's side of a split virtqueue.
type queue struct {
	// Set by QEMU. A queue runs once all of it is there: see running.
	size                          uint16
	descUser, availUser, usedUser uint64
	addressed                     bool
	kick, call                    int // eventfds, -1 if none
	enabled                       bool
	eventIdx, indirect            bool

	// The rings in guest memory; nil while they are not resolved.
	desc, avail, used []byte

	// The next available entry to take and the next used entry to write. They count modulo 2^16.
	nextAvail, nextUsed uint16
	// nextUsed as of the last notify that looked whether the guest wants to be interrupted.
	signalled uint16
	// Without EVENT_IDX: the guest was told not to kick.
	muted bool
}

func newQueue() queue { return queue{kick: -1, call: -1} }

// running reports whether the rings may be touched.
func (q *queue) running() bool {
	return q.enabled && q.kick >= 0 && q.desc != nil
}

// resolve finds the rings in mem. Without a size, addresses or memory it leaves the queue unresolved.
func (q *queue) resolve(mem *guestMemory) error {
	q.desc, q.avail, q.used = nil, nil, nil
	if !q.addressed || q.size == 0 || mem == nil {
		return nil
	}
	// The driver aligns the available ring to 2 only by the letter; every driver we know follows a table whose length is
	// a multiple of 16, and 4 lets us read flags and index at once.
	if q.descUser%16 != 0 || q.availUser%4 != 0 || q.usedUser%4 != 0 {
		return fmt.Errorf("rings at %#x, %#x, %#x are not aligned", q.descUser, q.availUser, q.usedUser)
	}
	n := int(q.size)
	desc, err := mem.atUser(q.descUser, n*descLen)
	if err != nil {
		return fmt.Errorf("descriptor table: %w", err)
	}
	avail, err := mem.atUser(q.availUser, 6+2*n)
	if err != nil {
		return fmt.Errorf("available ring: %w", err)
	}
	used, err := mem.atUser(q.usedUser, 6+usedElemLen*n)
	if err != nil {
		return fmt.Errorf("used ring: %w", err)
	}
	q.desc, q.avail, q.used = desc, avail, used
	q.nextUsed = uint16(atomic.LoadUint32(word(used)) >> 16)
	q.signalled = q.nextUsed
	return nil
}

// word is the flags and index at the start of a ring, which the other side writes or reads meanwhile.
func word(ring []byte) *uint32 { return (*uint32)(unsafe.Pointer(&ring[0])) }

// short reads a 16-bit field that the other side may write meanwhile.
func short(b []byte) uint16 { return *(*uint16)(unsafe.Pointer(&b[0])) }

// available is how many chains wait.
func (q *queue) available() (int, error) {
	n := uint16(atomic.LoadUint32(word(q.avail))>>16) - q.nextAvail
	if n > q.size {
		return 0, fmt.Errorf("%d chains available in a ring of %d", n, q.size)
	}
	return int(n), nil
}

// chain is one chain of descriptors.
type chain struct {
	head  uint16
	parts [][]byte
	len   int
}

// pop takes the next chain into c, which it reuses. Every part of it is for reading, or, if writable, for writing.
func (q *queue) pop(mem *guestMemory, c *chain, writable bool) (bool, error) {
	n, err := q.available()
	if err != nil || n == 0 {
		return false, err
	}
	slot := 4 + 2*int(q.nextAvail&(q.size-1))
	c.head = short(q.avail[slot:])
	c.parts, c.len = c.parts[:0], 0
	if err := q.walk(mem, c, writable); err != nil {
		return false, err
	}
	q.nextAvail++
	return true, nil
}

// unpop puts back the last n chains popped, of which none was pushed.
func (q *queue) unpop(n int) { q.nextAvail -= uint16(n) }

// walk follows a chain. It visits each descriptor of a table at most once, so a loop ends it.
func (q *queue) walk(mem *guestMemory, c *chain, writable bool) error {
	table, size, index := q.desc, int(q.size), int(c.head)
	indirect := false
	for steps := 0; ; steps++ {
		if index >= size {
			return fmt.Errorf("descriptor %d in a table of %d", index, size)
		}
		if steps >= size {
			return fmt.Errorf("descriptor chain loops")
		}
		// Copied, so that what is checked is what is used.
		d := [descLen]byte(table[index*descLen:])
		addr := binary.LittleEndian.Uint64(d[0:])
		length := binary.LittleEndian.Uint32(d[8:])
		flags := binary.LittleEndian.Uint16(d[12:])
		if flags&descIndirect != 0 {
			n := int(length / descLen)
			switch {
			case indirect || !q.indirect || flags&descNext != 0 || steps != 0:
				return fmt.Errorf("indirect descriptor where none may be")
			case length%descLen != 0 || n == 0 || n > maxQueueSize:
				return fmt.Errorf("indirect table of %d bytes", length)
			}
			var err error
			if table, err = mem.at(addr, n*descLen); err != nil {
				return fmt.Errorf("indirect table: %w", err)
			}
			// Its first descriptor is the next to look at.
			size, index, indirect, steps = n, 0, true, -1
			continue
		}
		if (flags&descWrite != 0) != writable {
			return fmt.Errorf("descriptor with flags %#x in the wrong ring", flags)
		}
		if c.len += int(length); c.len > headerLen+maxPayload {
			return fmt.Errorf("descriptor chain of %d bytes", c.len)
		}
		var err error
		if c.parts, err = mem.appendSlices(c.parts, addr, length); err != nil {
			return err
		}
		if flags&descNext == 0 {
			return nil
		}
		index = int(binary.LittleEndian.Uint16(d[14:]))
	}
}

// push gives a chain back, n bytes of which were written.
func (q *queue) push(head uint16, n int) {
	elem := q.used[4+usedElemLen*int(q.nextUsed&(q.size-1)):]
	binary.LittleEndian.PutUint32(elem[0:], uint32(head))
	binary.LittleEndian.PutUint32(elem[4:], uint32(n))
	q.nextUsed++
	// The store releases the element, and what was written through the chain, to the guest.
	atomic.StoreUint32(word(q.used), uint32(q.nextUsed)<<16|q.usedFlags())
}

func (q *queue) usedFlags() uint32 {
	if q.muted {
		return usedNoNotify
	}
	return 0
}

// notify interrupts the guest if it wants to hear of what was pushed since the last notify.
func (q *queue) notify() error {
	if q.nextUsed == q.signalled {
		return nil
	}
	old := q.signalled
	q.signalled = q.nextUsed
	// The used index must be visible before we look at what the guest wants: an atomic load after an atomic store is
	// never moved before it.
	flags := uint16(atomic.LoadUint32(word(q.avail)))
	if q.eventIdx {
		event := short(q.avail[4+2*int(q.size):])
		// vring_need_event: did the index pass event?
		if q.nextUsed-event-1 >= q.nextUsed-old {
			return nil
		}
	} else if flags&availNoInterrupt != 0 {
		return nil
	}
	if q.call < 0 {
		return nil
	}
	one := [8]byte{1}
	for {
		_, err := unix.Write(q.call, one[:])
		switch err {
		case nil, unix.EAGAIN: // a full counter is an interrupt that is pending already
			return nil
		case unix.EINTR:
		default:
			return fmt.Errorf("cannot interrupt the guest: %w", err)
		}
	}
}

// listen asks the guest for a kick when it makes a chain available, and reports whether there is one already.
func (q *queue) listen() (bool, error) {
	if q.eventIdx {
		*(*uint16)(unsafe.Pointer(&q.used[4+usedElemLen*int(q.size)])) = q.nextAvail
	}
	q.muted = false
	// Also the barrier between the write above and the read below: the guest writes its index and then looks here.
	atomic.StoreUint32(word(q.used), uint32(q.nextUsed)<<16)
	n, err := q.available()
	return n > 0, err
}

// mute tells the guest not to kick. With EVENT_IDX that is so by itself until the next listen.
func (q *queue) mute() {
	if !q.eventIdx && !q.muted {
		q.muted = true
		atomic.StoreUint32(word(q.used), uint32(q.nextUsed)<<16|usedNoNotify)
	}
}
