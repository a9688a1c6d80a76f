package vhostvsock

import (
	"encoding/binary"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Each of these lets the fuzzer play one hostile party: QEMU, a driver that writes what it likes into guest memory, a
// driver with sound rings and any packets. Nothing may panic, and every bound must hold.

// fuzzDevice makes a Device without QEMU. The other ends of its sockets are kept open.
func fuzzDevice(t *testing.T) *Device {
	t.Helper()
	var fds []int
	for range 2 {
		p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, p[0], p[1])
	}
	control, listener := os.NewFile(uintptr(fds[0]), "control"), os.NewFile(uintptr(fds[2]), "no listener")
	d, err := newDevice(Config{CID: simCID, Port: simPort, Control: control, Listener: listener})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.destroy()
		_ = control.Close()
		_ = listener.Close()
		_ = unix.Close(fds[1])
		_ = unix.Close(fds[3])
	})
	return d
}

// checkBounds is what must be true of a Device whatever was done to it.
func checkBounds(t *testing.T, d *Device) {
	t.Helper()
	if len(d.byID) > maxConns || len(d.byPort) > len(d.byID) || len(d.waitingGuest) > maxWaitingGuest ||
		len(d.waitingHost) > maxWaitingHost || len(d.resets) > maxOwedResets+maxConns || len(d.ready) > len(d.byID) ||
		len(d.closing) > len(d.byID) {
		t.Fatalf("%d connections, %d by port, %d waiting, %d of the daemon's, %d resets, %d ready, %d closing", len(d.byID),
			len(d.byPort), len(d.waitingGuest), len(d.waitingHost), len(d.resets), len(d.ready), len(d.closing))
	}
	for _, c := range d.byID {
		if c.phase == phaseGone || c.buffered() > bufAlloc || cap(c.buf) > 2*bufAlloc {
			t.Fatalf("a connection in phase %d keeps %d bytes in %d", c.phase, c.buffered(), cap(c.buf))
		}
		if under := c.received - c.forwarded; under != uint32(c.buffered()) {
			t.Fatalf("%d bytes under way, %d kept", under, c.buffered())
		}
	}
	for port, c := range d.byPort {
		if d.byID[c.id] != c || c.port != port || !c.known() {
			t.Fatalf("connection %d of port %d is not known under it", c.id, port)
		}
	}
	for _, c := range d.ready {
		if d.byID[c.id] != c || !c.queued {
			t.Fatal("something gone is ready")
		}
	}
}

// FuzzMessages is a hostile QEMU. Each message: request, flags, descriptors, length of the payload, payload.
func FuzzMessages(f *testing.F) {
	u32s := func(v ...uint32) (b []byte) {
		for _, x := range v {
			b = binary.LittleEndian.AppendUint32(b, x)
		}
		return b
	}
	encode := func(request, flags, fds byte, payload []byte) []byte {
		return append([]byte{request, flags, fds, byte(len(payload))}, payload...)
	}
	table := append(u32s(1, 0), make([]byte, 32)...)
	binary.LittleEndian.PutUint64(table[16:], 0x10000)
	start := encode(reqSetFeatures, 1, 0, u64(featProtocolFeatures|featVersion1|featEventIdx))
	start = append(start, encode(reqSetProtocolFeatures, 1, 0, u64(protocolFeatures))...)
	start = append(start, encode(reqSetMemTable, 9, 1, table)...)
	for i := range uint32(2) {
		start = append(start, encode(reqSetVringNum, 1, 0, u32s(i, 64))...)
		start = append(start, encode(reqSetVringBase, 1, 0, u32s(i, 0))...)
		start = append(start, encode(reqSetVringAddr, 1, 0, u32s(i, 0, i*0x4000, 0, i*0x4000+0x2000, 0, i*0x4000+0x1000, 0, 0, 0))...)
		start = append(start, encode(reqSetVringCall, 1, 1, u32s(i, 0))...)
		start = append(start, encode(reqSetVringKick, 1, 1, u32s(i, 0))...)
		start = append(start, encode(reqSetVringEnable, 9, 0, u32s(i, 1))...)
	}
	f.Add(start)
	f.Add(append(start, encode(reqGetVringBase, 1, 0, u32s(1, 0))...))
	f.Add(encode(reqGetConfig, 1, 0, append(u32s(0, 8, 0), make([]byte, 8)...)))
	f.Add(encode(reqGetFeatures, 1, 0, nil))

	f.Fuzz(func(t *testing.T, in []byte) {
		d := fuzzDevice(t)
		mem, err := unix.MemfdCreate("guest", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(mem)
		if err := unix.Ftruncate(mem, 0x10000); err != nil {
			t.Fatal(err)
		}
		for len(in) >= 4 {
			m := &message{request: uint32(in[0]), flags: uint32(in[1])}
			n := min(int(in[3]), len(in)-4)
			for range int(in[2]) % (maxRegions + 2) {
				var fd int
				if m.request == reqSetMemTable {
					fd, err = unix.FcntlInt(uintptr(mem), unix.F_DUPFD_CLOEXEC, 0)
				} else {
					fd, err = unix.Eventfd(0, unix.EFD_CLOEXEC)
				}
				if err != nil {
					t.Fatal(err)
				}
				m.fds = append(m.fds, fd)
			}
			m.payload = in[4 : 4+n : 4+n]
			in = in[4+n:]
			if d.handleMessage(m) != nil {
				break
			}
			if _, err := d.turn(); err != nil {
				break
			}
			checkBounds(t, d)
		}
	})
}

// FuzzReader is a hostile QEMU at the level of bytes: what messageReader makes of them.
func FuzzReader(f *testing.F) {
	f.Add([]byte{1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0})
	f.Add([]byte{5, 0, 0, 0, 1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff})
	f.Add([]byte{2, 0, 0, 0, 1, 0, 0, 0, 8, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9})
	f.Fuzz(func(t *testing.T, in []byte) {
		p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(p[0])
		in = in[:min(len(in), 16<<10)]
		if len(in) > 0 {
			if _, err := unix.Write(p[1], in); err != nil {
				t.Fatal(err)
			}
		}
		_ = unix.Close(p[1])
		r := messageReader{fd: p[0]}
		defer r.close()
		total := 0
		for {
			m, err := r.next()
			if err != nil {
				break
			}
			if total += messageHeaderLen + len(m.payload); total > len(in) {
				t.Fatalf("%d bytes of messages in %d bytes", total, len(in))
			}
		}
	})
}

const (
	fuzzMem   = 0x10000
	fuzzQueue = 8
)

// giveRings puts both rings into memory of the test's own.
func giveRings(t *testing.T, d *Device, mem []byte, features byte) {
	t.Helper()
	d.mem = &guestMemory{regions: []region{{guest: 0, user: 0, data: mem[:0x8000:0x8000]}, {guest: 0x8000, user: 0x8000, data: mem[0x8000:]}}}
	t.Cleanup(func() { d.mem = nil }) // not mapped
	for i := range d.queues {
		q := &d.queues[i]
		q.size, q.enabled, q.addressed = fuzzQueue, true, true
		q.eventIdx, q.indirect = features&1 != 0, features&2 != 0
		base := uint64(i) * 0x400
		q.descUser, q.availUser, q.usedUser = base, base+0x100, base+0x200
		q.kick = eventfd(t)
		if err := q.resolve(d.mem); err != nil {
			t.Fatal(err)
		}
	}
}

// FuzzRings is a hostile driver: guest memory is the fuzzer's, rings included, and changes between turns.
func FuzzRings(f *testing.F) {
	put := func(mem []byte, at int, addr uint64, length uint32, flags, next uint16) {
		binary.LittleEndian.PutUint64(mem[at:], addr)
		binary.LittleEndian.PutUint32(mem[at+8:], length)
		binary.LittleEndian.PutUint16(mem[at+12:], flags)
		binary.LittleEndian.PutUint16(mem[at+14:], next)
	}
	seed := make([]byte, 0x1000)
	put(seed, 0x000, 0x1000, 0x100, descWrite, 0)   // rx 0
	put(seed, 0x400, 0x800, headerLen, descNext, 1) // tx 0
	put(seed, 0x410, 0x900, 0x10, 0, 0)             // tx 1
	put(seed, 0x420, 0xa00, 2*16, descIndirect, 0)  // tx 2
	put(seed, 0xa00, 0x800, headerLen, descNext, 1) //
	put(seed, 0xa10, 0x900, 0x10, 0, 0)             //
	binary.LittleEndian.PutUint16(seed[0x102:], 1)  // rx available
	binary.LittleEndian.PutUint16(seed[0x502:], 2)  // tx available
	binary.LittleEndian.PutUint16(seed[0x506:], 2)  // the indirect one
	h := packetOf(opRequest, 1)
	h.encode((*[headerLen]byte)(seed[0x800:]))
	f.Add(byte(0), seed)
	f.Add(byte(1), seed)
	f.Add(byte(3), seed)
	loop := append([]byte{}, seed...)
	put(loop, 0x410, 0x900, 0x10, descNext, 0)
	f.Add(byte(3), loop)

	f.Fuzz(func(t *testing.T, features byte, in []byte) {
		d := fuzzDevice(t)
		mem := make([]byte, fuzzMem)
		giveRings(t, d, mem, features)
		// A guest may write anywhere at any time; here it does so between turns, a piece at a time.
		for len(in) > 0 {
			n := copy(mem, in)
			in = in[n:]
			for range 4 {
				if _, err := d.turn(); err != nil {
					return
				}
				checkBounds(t, d)
			}
			binary.LittleEndian.PutUint16(mem[0x502:], binary.LittleEndian.Uint16(mem[0x502:])+1)
		}
		if err := d.transmitAll(); err == nil {
			checkBounds(t, d)
		}
	})
}

// FuzzPackets is a hostile driver with sound rings. Each packet: what the daemon does before it, operation, port, flags,
// length of the payload, its true length.
func FuzzPackets(f *testing.F) {
	f.Add([]byte{
		0, opRequest, 1, 0, 0, 0, 1, opRW, 1, 0, 9, 9, 2, opRW, 1, 0, 200, 200, 0, opShutdown, 1, 2, 0, 0,
		3, opShutdown, 1, 3, 0, 0,
	})
	f.Add([]byte{0, opRequest, 1, 0, 0, 0, 0, opRequest, 1, 0, 0, 0, 0, opReset, 1, 0, 0, 0})
	f.Add([]byte{1, opRequest, 1, 0, 0, 0, 0, opRW, 1, 0, 255, 1})
	f.Fuzz(func(t *testing.T, in []byte) {
		d := fuzzDevice(t)
		mem := make([]byte, fuzzMem)
		giveRings(t, d, mem, 1)
		rx := &d.queues[rxQueue]
		for i := range fuzzQueue {
			b := mem[i*descLen:]
			binary.LittleEndian.PutUint64(b, 0x1000+uint64(i)*0x200)
			binary.LittleEndian.PutUint32(b[8:], 0x200)
			binary.LittleEndian.PutUint16(b[12:], descWrite)
			binary.LittleEndian.PutUint16(mem[0x104+2*i:], uint16(i))
		}
		var daemon []int
		defer func() { closeAll(daemon) }()
		payload := make([]byte, 3*maxPayload)
		var events [64]unix.EpollEvent
		for range 200 {
			if len(in) < 6 {
				break
			}
			daemon = fuzzDaemon(t, d, daemon, in[0])
			h := packetOf(uint16(in[1]), uint32(in[2]%8))
			h.flags = uint32(in[3])
			h.length = uint32(in[4]) * 700
			h.bufAlloc = uint32(in[3]) << 8
			parts := make([]byte, headerLen, headerLen+3*maxPayload)
			h.encode((*[headerLen]byte)(parts))
			parts = append(parts, payload[:int(in[5])*700]...)
			in = in[6:]
			d.packet([][]byte{parts[:30:30], parts[30:]})
			checkBounds(t, d)
			// The guest gives back every buffer at times.
			if h.flags&1 == 0 {
				binary.LittleEndian.PutUint16(mem[0x102:], rx.nextAvail+fuzzQueue)
			}
			if err := d.wait(events[:], true); err != nil {
				return
			}
			if _, err := d.turn(); err != nil {
				t.Fatal(err) // the rings are sound
			}
			checkBounds(t, d)
		}
	})
}

// fuzzDaemon lets the daemon connect, write, read, shut or close.
func fuzzDaemon(t *testing.T, d *Device, daemon []int, what byte) []int {
	t.Helper()
	var last int
	if len(daemon) > 0 {
		last = daemon[int(what>>3)%len(daemon)]
	}
	switch what & 7 {
	case 1:
		if len(d.waitingHost) >= maxWaitingHost {
			break
		}
		p, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
		if err != nil {
			t.Fatal(err)
		}
		h := hostConn{id: d.newID(), fd: p[0]}
		if err := d.watch(h.fd, watchHost, h.id, unix.EPOLLRDHUP); err != nil {
			t.Fatal(err)
		}
		d.waitingHost = append(d.waitingHost, h)
		d.pair()
		daemon = append(daemon, p[1])
	case 2:
		if len(daemon) > 0 {
			_, _ = unix.SendmsgN(last, make([]byte, 1+int(what)*50), nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
		}
	case 3:
		if len(daemon) > 0 {
			_, _, _ = unix.Recvfrom(last, make([]byte, 300_000), unix.MSG_DONTWAIT)
		}
	case 4, 5:
		if len(daemon) > 0 {
			_ = unix.Shutdown(last, int(what&1))
		}
	case 6:
		if len(daemon) > 0 {
			_ = unix.Shutdown(last, unix.SHUT_RDWR)
		}
	}
	return daemon
}
