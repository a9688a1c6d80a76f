package vhostvsock

import (
	"encoding/binary"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The other side of a Device, simulated: QEMU's vhost-user messages and a guest's vsock driver.

const (
	simCID  = 42
	simPort = 1023

	simSize = 64 // descriptors of a ring
	// Guest memory: the rings' page, tables for indirect descriptors, then a slot for each descriptor of either ring.
	simRings    = 0x0000
	simIndirect = 0x8000
	simSlots    = 0x10000
	simSlot     = headerLen + maxPayload
	simMem      = simSlots + 2*simSize*(simSlot+64)
	// QEMU's address of guest address 0, and the guest's own of the memory's start.
	simUser  = 0x7f0000000000
	simGuest = 0x100000

	// How long a test waits for the other side before it has failed.
	patience = 20 * time.Second
)

// sim is QEMU and its guest.
type sim struct {
	t        testing.TB
	features uint64
	control  int
	mem      []byte
	memFD    int
	q        [numQueues]*driverQueue
	sock     string
	done     chan error // what Serve returned
}

// driverQueue is the driver's side of a ring.
type driverQueue struct {
	base       int // of its rings in mem
	slots      int
	kick, call int
	nextAvail  uint16
	lastUsed   uint16
	free       []uint16
	sent       uint16 // of nextAvail, told by a kick or found unneeded
}

func (q *driverQueue) desc() int  { return q.base }
func (q *driverQueue) avail() int { return q.base + 16*simSize }
func (q *driverQueue) used() int  { return q.base + 0x1000 }

// newSim starts a Device and brings its rings up.
func newSim(t testing.TB, features uint64) *sim {
	t.Helper()
	s := startSim(t)
	s.features = features
	s.negotiate()
	s.startRings(0, 0)
	return s
}

// startSim starts a Device to which nothing was said.
func startSim(t testing.TB) *sim {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := &sim{t: t, control: pair[0], done: make(chan error, 1)}
	s.sock = filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.sock, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	lf, err := l.File()
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	_ = l.Close()
	if s.memFD, err = unix.MemfdCreate("guest", unix.MFD_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	if err := unix.Ftruncate(s.memFD, simMem); err != nil {
		t.Fatal(err)
	}
	if s.mem, err = unix.Mmap(s.memFD, 0, simMem, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
		t.Fatal(err)
	}
	control := os.NewFile(uintptr(pair[1]), "control")
	go func() {
		err := Serve(Config{CID: simCID, Port: simPort, Control: control, Listener: lf})
		_ = control.Close()
		_ = lf.Close()
		s.done <- err
	}()
	t.Cleanup(func() {
		_ = unix.Shutdown(s.control, unix.SHUT_RDWR)
		select {
		case <-s.done:
		case <-time.After(patience):
			t.Error("the device did not end when QEMU had gone")
		}
		_ = unix.Close(s.control)
		_ = unix.Close(s.memFD)
		_ = unix.Munmap(s.mem)
		for _, q := range s.q {
			if q != nil {
				_ = unix.Close(q.kick)
				_ = unix.Close(q.call)
			}
		}
	})
	return s
}

// ended waits for the Device's end.
func (s *sim) ended() error {
	s.t.Helper()
	select {
	case err := <-s.done:
		s.done <- err
		return err
	case <-time.After(patience):
		s.t.Fatal("the device still runs")
		return nil
	}
}

// message sends a vhost-user message, and returns the reply's payload if one is due.
func (s *sim) message(request, flags uint32, payload []byte, fds ...int) []byte {
	s.t.Helper()
	b := binary.LittleEndian.AppendUint32(nil, request)
	b = binary.LittleEndian.AppendUint32(b, flags|messageVersion)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(payload)))
	b = append(b, payload...)
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if err := unix.Sendmsg(s.control, b, oob, nil, unix.MSG_NOSIGNAL); err != nil {
		s.t.Fatalf("cannot send message %d: %v", request, err)
	}
	switch request {
	case reqGetFeatures, reqGetProtocolFeatures, reqGetQueueNum, reqGetConfig, reqGetVringBase:
	default:
		if flags&messageNeedReply == 0 {
			return nil
		}
	}
	return s.readReply(request)
}

func (s *sim) readReply(request uint32) []byte {
	s.t.Helper()
	head := make([]byte, messageHeaderLen)
	s.readFull(head)
	if got := binary.LittleEndian.Uint32(head); got != request {
		s.t.Fatalf("reply to %d, want to %d", got, request)
	}
	if flags := binary.LittleEndian.Uint32(head[4:]); flags != messageVersion|messageReply {
		s.t.Fatalf("reply with flags %#x", flags)
	}
	payload := make([]byte, binary.LittleEndian.Uint32(head[8:]))
	s.readFull(payload)
	return payload
}

func (s *sim) readFull(b []byte) {
	s.t.Helper()
	for n := 0; n < len(b); {
		waitReadable(s.t, s.control)
		k, err := unix.Read(s.control, b[n:])
		if err != nil || k == 0 {
			s.t.Fatalf("cannot read a reply: %d bytes, %v", k, err)
		}
		n += k
	}
}

func waitReadable(t testing.TB, fd int) {
	t.Helper()
	for {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, int(patience/time.Millisecond))
		if err == unix.EINTR {
			continue
		}
		if err != nil || n == 0 {
			t.Fatalf("nothing came in %v (%v)", patience, err)
		}
		return
	}
}

func (s *sim) negotiate() {
	s.t.Helper()
	if f := binary.LittleEndian.Uint64(s.message(reqGetFeatures, 0, nil)); f != deviceFeatures {
		s.t.Fatalf("features %#x", f)
	}
	if f := binary.LittleEndian.Uint64(s.message(reqGetProtocolFeatures, 0, nil)); f != protocolFeatures {
		s.t.Fatalf("protocol features %#x", f)
	}
	s.message(reqSetProtocolFeatures, 0, u64(protocolFeatures))
	s.message(reqSetOwner, 0, nil)
	s.message(reqSetFeatures, messageNeedReply, u64(s.features|featProtocolFeatures|featVersion1))
	s.memTable()
}

// memTable splits the memory in two adjoining regions, in the middle of a slot.
func (s *sim) memTable() {
	s.t.Helper()
	const cut = simSlots + 0x3000
	p := binary.LittleEndian.AppendUint64(nil, 2)
	for _, r := range [][2]uint64{{0, cut}, {cut, simMem - cut}} {
		for _, v := range []uint64{simGuest + r[0], r[1], simUser + r[0], r[0]} {
			p = binary.LittleEndian.AppendUint64(p, v)
		}
	}
	s.message(reqSetMemTable, messageNeedReply, p, s.memFD, s.memFD)
}

// startRings starts both rings from the given indexes.
func (s *sim) startRings(rxBase, txBase uint16) {
	s.t.Helper()
	for i, base := range []uint16{rxBase, txBase} {
		q := s.q[i]
		if q == nil {
			q = &driverQueue{base: simRings + i*0x4000, slots: simSlots + i*simSize*(simSlot+64)}
			q.kick, q.call = eventfd(s.t), eventfd(s.t)
			s.q[i] = q
			for d := range uint16(simSize) {
				q.free = append(q.free, d)
			}
			if i == rxQueue {
				for range simSize / 2 {
					s.post(4096)
				}
			}
		}
		index := binary.LittleEndian.AppendUint32(nil, uint32(i))
		s.message(reqSetVringNum, 0, binary.LittleEndian.AppendUint32(index, simSize))
		s.message(reqSetVringBase, 0, binary.LittleEndian.AppendUint32(index, uint32(base)))
		addr := binary.LittleEndian.AppendUint32(index, 0)
		for _, a := range []int{q.desc(), q.used(), q.avail(), 0} {
			addr = binary.LittleEndian.AppendUint64(addr, uint64(simUser+a))
		}
		s.message(reqSetVringAddr, 0, addr)
		s.message(reqSetVringCall, 0, u64(uint64(i)), q.call)
		s.message(reqSetVringKick, 0, u64(uint64(i)), q.kick)
		s.message(reqSetVringEnable, messageNeedReply, binary.LittleEndian.AppendUint32(index, 1))
	}
}

// stopRings returns the indexes where they stopped.
func (s *sim) stopRings() (rx, tx uint16) {
	s.t.Helper()
	var got [2]uint16
	for i := range got {
		answer := s.message(reqGetVringBase, 0, binary.LittleEndian.AppendUint64(nil, uint64(i)))
		got[i] = uint16(binary.LittleEndian.Uint32(answer[4:]))
	}
	return got[0], got[1]
}

func eventfd(t testing.TB) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	return fd
}

// putDesc writes a descriptor of a table at offset table.
func (s *sim) putDesc(table, i int, addr uint64, length int, flags, next uint16) {
	b := s.mem[table+16*i:]
	binary.LittleEndian.PutUint64(b, addr)
	binary.LittleEndian.PutUint32(b[8:], uint32(length))
	binary.LittleEndian.PutUint16(b[12:], flags)
	binary.LittleEndian.PutUint16(b[14:], next)
}

// offer makes a chain available.
func (s *sim) offer(q *driverQueue, head uint16) {
	binary.LittleEndian.PutUint16(s.mem[q.avail()+4+2*int(q.nextAvail%simSize):], head)
	q.nextAvail++
	atomic.StoreUint32(word(s.mem[q.avail():]), uint32(q.nextAvail)<<16)
}

// kick tells the device of what was offered, if it wants to hear of it.
func (s *sim) kick(q *driverQueue) {
	s.t.Helper()
	old := q.sent
	q.sent = q.nextAvail
	flags := uint16(atomic.LoadUint32(word(s.mem[q.used():])))
	if s.features&featEventIdx != 0 {
		event := short(s.mem[q.used()+4+8*simSize:])
		if q.nextAvail-event-1 >= q.nextAvail-old {
			return
		}
	} else if flags&usedNoNotify != 0 {
		return
	}
	one := [8]byte{1}
	if _, err := unix.Write(q.kick, one[:]); err != nil {
		s.t.Fatal(err)
	}
}

// wantInterrupt asks for an interrupt at the next used chain, and reports whether there is one already.
func (s *sim) wantInterrupt(q *driverQueue) bool {
	binary.LittleEndian.PutUint16(s.mem[q.avail()+4+2*simSize:], q.lastUsed)
	atomic.StoreUint32(word(s.mem[q.avail():]), uint32(q.nextAvail)<<16)
	return s.hasUsed(q)
}

func (s *sim) hasUsed(q *driverQueue) bool {
	return uint16(atomic.LoadUint32(word(s.mem[q.used():]))>>16) != q.lastUsed
}

// waitUsed waits for a used chain, and takes it.
func (s *sim) waitUsed(q *driverQueue) (head uint16, n int) {
	s.t.Helper()
	for !s.hasUsed(q) {
		if s.wantInterrupt(q) {
			break
		}
		waitReadable(s.t, q.call)
		var b [8]byte
		_, _ = unix.Read(q.call, b[:])
	}
	e := s.mem[q.used()+4+8*int(q.lastUsed%simSize):]
	q.lastUsed++
	return uint16(binary.LittleEndian.Uint32(e)), int(binary.LittleEndian.Uint32(e[4:]))
}

func (s *sim) slot(q *driverQueue, d uint16) int { return q.slots + int(d)*(simSlot+64) }

// post gives the device a receive buffer: a header's descriptor and another one, as Linux 6.1 does.
func (s *sim) post(size int) {
	q := s.q[rxQueue]
	h, b := q.free[0], q.free[1]
	q.free = q.free[2:]
	at := uint64(simGuest + s.slot(q, h))
	s.putDesc(q.desc(), int(h), at, headerLen, descWrite|descNext, b)
	s.putDesc(q.desc(), int(b), at+headerLen, size, descWrite, 0)
	s.offer(q, h)
}

// send sends a packet and waits until the device has taken it.
func (s *sim) send(h header, payload []byte) {
	s.t.Helper()
	s.queue(h, payload)
	q := s.q[txQueue]
	s.kick(q)
	s.waitUsed(q)
}

// queue puts a packet in the transmit ring, without a kick. With indirect descriptors if they were negotiated.
func (s *sim) queue(h header, payload []byte) {
	s.t.Helper()
	q := s.q[txQueue]
	d := q.free[0]
	q.free = append(q.free[1:], d)
	at := s.slot(q, d)
	var raw [headerLen]byte
	h.encode(&raw)
	copy(s.mem[at:], raw[:])
	copy(s.mem[at+headerLen:], payload)
	addr := uint64(simGuest + at)
	if s.features&featIndirect != 0 {
		table := simIndirect + 32*int(d)
		s.putDesc(table, 0, addr, headerLen, descNext, 1)
		s.putDesc(table, 1, addr+headerLen, len(payload), 0, 0)
		s.putDesc(q.desc(), int(d), uint64(simGuest+table), 32, descIndirect, 0)
	} else {
		s.putDesc(q.desc(), int(d), addr, headerLen+len(payload), 0, 0)
	}
	s.offer(q, d)
}

// packetOf makes a packet's header as the guest would.
func packetOf(op uint16, port uint32) header {
	return header{srcCID: simCID, dstCID: hostCID, srcPort: port, dstPort: simPort, kind: typeStream, op: op, bufAlloc: 1 << 18}
}

// receive waits for a packet to the guest, and posts a buffer in its place.
func (s *sim) receive() (header, []byte) {
	s.t.Helper()
	h, p := s.take()
	s.post(4096)
	s.kick(s.q[rxQueue])
	return h, p
}

// take waits for a packet to the guest and keeps its buffer.
func (s *sim) take() (header, []byte) {
	s.t.Helper()
	q := s.q[rxQueue]
	head, n := s.waitUsed(q)
	at := s.slot(q, head)
	h := decodeHeader((*[headerLen]byte)(s.mem[at:]))
	if h.srcCID != hostCID || h.dstCID != simCID || h.kind != typeStream || int(h.length) != n-headerLen {
		s.t.Fatalf("packet %+v in %d bytes", h, n)
	}
	payload := append([]byte{}, s.mem[at+headerLen:at+n]...)
	next := binary.LittleEndian.Uint16(s.mem[q.desc()+16*int(head)+14:])
	q.free = append(q.free, head, next)
	return h, payload
}

// expect waits for a packet of one operation on one port, and passes over credit.
func (s *sim) expect(op uint16, port uint32) (header, []byte) {
	s.t.Helper()
	for {
		h, p := s.receive()
		if h.op == opCreditUpdate && op != opCreditUpdate {
			continue
		}
		if h.op != op || h.dstPort != port {
			s.t.Fatalf("packet %+v, want operation %d on port %d", h, op, port)
		}
		return h, p
	}
}

// dial connects as the daemon does.
func (s *sim) dial() *net.UnixConn {
	s.t.Helper()
	c, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: s.sock, Net: "unix"})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = c.Close() })
	_ = c.SetDeadline(time.Now().Add(patience))
	return c
}

// open opens a connection from the guest and joins it with one of the daemon's.
func (s *sim) open(port uint32) *net.UnixConn {
	s.t.Helper()
	s.send(packetOf(opRequest, port), nil)
	s.expect(opResponse, port)
	c := s.dial()
	// A byte each way: joined.
	s.rw(port, []byte{byte(port)})
	var b [1]byte
	if _, err := c.Read(b[:]); err != nil || b[0] != byte(port) {
		s.t.Fatalf("read %v, %v", b, err)
	}
	return c
}

// rw sends data.
func (s *sim) rw(port uint32, data []byte) {
	s.t.Helper()
	h := packetOf(opRW, port)
	h.length = uint32(len(data))
	s.send(h, data)
}

func (h header) String() string {
	return fmt.Sprintf("op %d %d→%d len %d flags %d", h.op, h.srcPort, h.dstPort, h.length, h.flags)
}
