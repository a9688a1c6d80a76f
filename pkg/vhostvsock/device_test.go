package vhostvsock

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// featureSets are what drivers may accept of the device.
var featureSets = map[string]uint64{
	"plain":          0,
	"indirect":       featIndirect,
	"eventidx":       featEventIdx,
	"eventidx+indir": featEventIdx | featIndirect,
}

func TestConfigGivesTheCID(t *testing.T) {
	s := newSim(t, 0)
	ask := func(offset, size uint32) []byte {
		p := binary.LittleEndian.AppendUint32(nil, offset)
		p = binary.LittleEndian.AppendUint32(p, size)
		return s.message(reqGetConfig, 0, append(p, make([]byte, 4+size)...))
	}
	if got := ask(0, 8); !bytes.Equal(got[12:], u64(simCID)) {
		t.Errorf("config is %x", got)
	}
	if got := ask(4, 8); binary.LittleEndian.Uint32(got[4:]) != 0 {
		t.Errorf("config past its end is %x, want no bytes", got)
	}
	if got := s.message(reqGetQueueNum, 0, nil); !bytes.Equal(got, u64(numQueues)) {
		t.Errorf("queues %x", got)
	}
}

func TestEcho(t *testing.T) {
	for name, features := range featureSets {
		t.Run(name, func(t *testing.T) {
			s := newSim(t, features)
			c := s.open(7)
			for range 200 {
				s.rw(7, []byte("ping"))
				var b [4]byte
				if _, err := io.ReadFull(c, b[:]); err != nil || string(b[:]) != "ping" {
					t.Fatalf("the daemon read %q, %v", b, err)
				}
				if _, err := c.Write([]byte("pong")); err != nil {
					t.Fatal(err)
				}
				if _, p := s.expect(opRW, 7); string(p) != "pong" {
					t.Fatalf("the guest read %q", p)
				}
			}
		})
	}
}

func TestDaemonMayConnectFirst(t *testing.T) {
	s := newSim(t, featEventIdx)
	c := s.dial()
	s.send(packetOf(opRequest, 9), nil)
	s.expect(opResponse, 9)
	s.rw(9, []byte("hello"))
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		t.Fatalf("%q, %v", b, err)
	}
}

func TestDaemonThatWentIsNotJoined(t *testing.T) {
	s := newSim(t, featEventIdx)
	_ = s.dial().Close()
	c := s.open(5) // would time out if the first had been given the guest's connection
	_ = c.Close()
}

// TestBulk sends more than every buffer holds, both ways at once, and compares hashes.
func TestBulk(t *testing.T) {
	const size = 24 << 20
	for name, features := range featureSets {
		t.Run(name, func(t *testing.T) {
			s := newSim(t, features)
			c := s.open(3)
			data := make([]byte, size)
			_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
			want := sha256.Sum256(data)

			var wg sync.WaitGroup
			wg.Go(func() {
				h := sha256.New()
				if n, err := io.CopyN(h, c, size); err != nil || [32]byte(h.Sum(nil)) != want {
					t.Errorf("the daemon read %d bytes, %v, or others than were sent", n, err)
				}
			})
			wg.Go(func() {
				if _, err := c.Write(data); err != nil {
					t.Errorf("the daemon wrote: %v", err)
				}
			})
			if got := s.exchange(3, data, size); got != want {
				t.Error("the guest read other bytes than were sent")
			}
			wg.Wait()
		})
	}
}

// exchange is a guest that keeps to its credit: it sends data and reads size bytes, whose hash it returns.
func (s *sim) exchange(port uint32, data []byte, size int) [32]byte {
	s.t.Helper()
	const window = 1 << 18
	h := sha256.New()
	var read, told, sent, forwarded uint32
	sent = 1 // the byte of open
	header := func(op uint16) header {
		p := packetOf(op, port)
		p.bufAlloc, p.fwdCnt = window, read
		told = read
		return p
	}
	for len(data) > 0 || int(read) < size {
		if n := min(len(data), maxPayload, int(bufAlloc-(sent-forwarded))); n > 0 {
			p := header(opRW)
			p.length = uint32(n)
			s.send(p, data[:n])
			data = data[n:]
			sent += uint32(n)
			if !s.hasUsed(s.q[rxQueue]) {
				continue
			}
		}
		p, payload := s.receive()
		forwarded = p.fwdCnt
		h.Write(payload)
		if read += uint32(len(payload)); read-told > window/2 {
			s.send(header(opCreditUpdate), nil)
		}
	}
	return [32]byte(h.Sum(nil))
}

// TestStalledStream has 32 connections, one of which neither side reads. The others must not notice.
func TestStalledStream(t *testing.T) {
	s := newSim(t, featEventIdx|featIndirect)
	conns := map[uint32]*net.UnixConn{}
	for port := uint32(1); port <= 32; port++ {
		conns[port] = s.open(port)
	}
	// The guest sends on port 1 all that it may, which the daemon doesn't read; the daemon sends on port 1 until it blocks,
	// for the guest gives no more credit.
	for left := bufAlloc - 1; left > 0; left -= min(left, maxPayload) {
		s.rw(1, make([]byte, min(left, maxPayload)))
	}
	fill(t, conns[1])
	for round := range 20 {
		for port := uint32(2); port <= 32; port++ {
			msg := []byte{byte(port), byte(round)}
			s.rw(port, msg)
			var b [2]byte
			if _, err := io.ReadFull(conns[port], b[:]); err != nil || !bytes.Equal(b[:], msg) {
				t.Fatalf("port %d: the daemon read %v, %v", port, b, err)
			}
			if _, err := conns[port].Write(msg); err != nil {
				t.Fatal(err)
			}
			for {
				h, p := s.receive()
				if h.dstPort == port && h.op == opRW {
					if !bytes.Equal(p, msg) {
						t.Fatalf("port %d: the guest read %v", port, p)
					}
					break
				}
				if h.dstPort != 1 && h.op != opCreditUpdate {
					t.Fatalf("packet %v", h)
				}
			}
		}
	}
}

// fill writes to a socket until it takes no more.
func fill(t *testing.T, c *net.UnixConn) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	_ = raw.Control(func(fd uintptr) {
		for err = nil; err == nil; {
			_, err = unix.Write(int(fd), make([]byte, 4096))
		}
	})
	if !errors.Is(err, unix.EAGAIN) {
		t.Fatal(err)
	}
}

func TestHalfClose(t *testing.T) {
	s := newSim(t, featEventIdx)
	c := s.open(1)
	// The daemon's.
	if _, err := c.Write([]byte("request")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if _, p := s.expect(opRW, 1); string(p) != "request" {
		t.Fatalf("the guest read %q", p)
	}
	if h, _ := s.expect(opShutdown, 1); h.flags != shutSend {
		t.Fatalf("shutdown flags %d, want %d", h.flags, shutSend)
	}
	// The guest still answers, then shuts its half.
	s.rw(1, []byte("answer"))
	shut := packetOf(opShutdown, 1)
	shut.flags = shutSend
	s.send(shut, nil)
	if got, err := io.ReadAll(c); err != nil || string(got) != "answer" {
		t.Fatalf("the daemon read %q, %v", got, err)
	}
}

func TestGuestCloseKeepsItsBytes(t *testing.T) {
	s := newSim(t, featEventIdx)
	c := s.open(1)
	data := bytes.Repeat([]byte("0123456789abcdef"), (bufAlloc-1)/16)
	for rest := data; len(rest) > 0; {
		n := min(len(rest), maxPayload)
		s.rw(1, rest[:n])
		rest = rest[n:]
	}
	shut := packetOf(opShutdown, 1)
	shut.flags = shutBoth
	s.send(shut, nil)
	s.expect(opReset, 1)
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, data) {
		t.Fatalf("the daemon read %d bytes of %d, %v", len(got), len(data), err)
	}
}

func TestGuestReset(t *testing.T) {
	s := newSim(t, featEventIdx)
	c := s.open(1)
	s.send(packetOf(opReset, 1), nil)
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("the daemon read %v, want EOF", err)
	}
}

func TestDaemonClose(t *testing.T) {
	s := newSim(t, featEventIdx)
	c := s.open(1)
	_ = c.Close()
	if h, _ := s.expect(opShutdown, 1); h.flags != shutBoth {
		t.Fatalf("shutdown flags %d, want %d", h.flags, shutBoth)
	}
	s.send(packetOf(opReset, 1), nil)
	// The daemon comes back and so does the guest.
	_ = s.open(1)
}

// TestCloseTimeout is a guest that was told of the end and doesn't care.
func TestCloseTimeout(t *testing.T) {
	s := newSim(t, featEventIdx)
	c := s.open(1)
	_ = c.Close()
	s.expect(opShutdown, 1)
	s.expect(opReset, 1)
}

func TestDaemonStopsReading(t *testing.T) {
	s := newSim(t, featEventIdx)
	c := s.open(1)
	if err := c.CloseRead(); err != nil {
		t.Fatal(err)
	}
	s.rw(1, []byte("unheard"))
	if h, _ := s.expect(opShutdown, 1); h.flags != shutReceive {
		t.Fatalf("shutdown flags %d, want %d", h.flags, shutReceive)
	}
	if _, err := c.Write([]byte("still")); err != nil {
		t.Fatal(err)
	}
	if _, p := s.expect(opRW, 1); string(p) != "still" {
		t.Fatalf("the guest read %q", p)
	}
}

func TestGuestStopsReading(t *testing.T) {
	s := newSim(t, featEventIdx)
	c := s.open(1)
	shut := packetOf(opShutdown, 1)
	shut.flags = shutReceive
	s.send(shut, nil)
	// The shutdown was served when the packet after it has arrived.
	s.rw(1, []byte("x"))
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write([]byte("unheard")); !errors.Is(err, syscall.EPIPE) {
		t.Fatalf("the daemon wrote: %v, want EPIPE", err)
	}
}

// TestRefused are packets that get a reset, and leave other connections alone.
func TestRefused(t *testing.T) {
	with := func(op uint16, change func(*header)) header {
		h := packetOf(op, 50)
		change(&h)
		return h
	}
	for name, h := range map[string]header{
		"another port":             with(opRequest, func(h *header) { h.dstPort = simPort + 1 }),
		"another type":             with(opRequest, func(h *header) { h.kind = 2 }),
		"data without connection":  packetOf(opRW, 50),
		"unknown operation":        packetOf(99, 50),
		"credit of no connection":  packetOf(opCreditRequest, 50),
		"shutdown of nothing":      packetOf(opShutdown, 50),
		"response to no request":   packetOf(opResponse, 50),
		"second request":           packetOf(opRequest, 60),
		"unknown op on connection": packetOf(99, 60),
		"response on connection":   packetOf(opResponse, 60),
		"length without data":      with(opRW, func(h *header) { h.srcPort, h.length = 60, 10 }),
		"length past 64 KiB":       with(opRW, func(h *header) { h.srcPort, h.length = 60, 1<<31 }),
		"length of a control":      with(opCreditUpdate, func(h *header) { h.srcPort, h.length = 60, 4 }),
	} {
		t.Run(name, func(t *testing.T) {
			s := newSim(t, featEventIdx)
			other, c := s.open(1), s.open(60)
			s.send(h, nil)
			s.expect(opReset, h.srcPort)
			if h.srcPort == 60 {
				if _, err := c.Read(make([]byte, 1)); err != io.EOF {
					t.Errorf("the daemon read %v, want EOF", err)
				}
			}
			s.rw(1, []byte("x"))
			if _, err := other.Read(make([]byte, 1)); err != nil {
				t.Errorf("another connection: %v", err)
			}
		})
	}
}

// TestIgnored are packets that get no answer: the next answer is to what follows.
func TestIgnored(t *testing.T) {
	with := func(op uint16, change func(*header)) header {
		h := packetOf(op, 50)
		change(&h)
		return h
	}
	s := newSim(t, featEventIdx)
	for _, h := range []header{
		with(opRequest, func(h *header) { h.srcCID = simCID + 1 }), // forged
		with(opRequest, func(h *header) { h.dstCID = 3 }),          // to another guest
		packetOf(opReset, 50), // of nothing
	} {
		s.send(h, nil)
	}
	s.send(packetOf(opRequest, 51), nil)
	s.expect(opResponse, 51)
}

func TestCreditIsEnforced(t *testing.T) {
	s := newSim(t, featEventIdx)
	s.send(packetOf(opRequest, 1), nil)
	if h, _ := s.expect(opResponse, 1); h.bufAlloc != bufAlloc {
		t.Fatalf("buffer of %d", h.bufAlloc)
	}
	// Nobody reads: the daemon isn't there.
	for range bufAlloc / maxPayload {
		s.rw(1, make([]byte, maxPayload))
	}
	s.rw(1, []byte{1})
	s.expect(opReset, 1)
}

// TestGuestCreditIsKept has a guest of 10 bytes of room.
func TestGuestCreditIsKept(t *testing.T) {
	s := newSim(t, featEventIdx)
	h := packetOf(opRequest, 1)
	h.bufAlloc = 10
	s.send(h, nil)
	s.expect(opResponse, 1)
	c := s.dial()
	h = packetOf(opRW, 1)
	h.bufAlloc, h.length = 10, 1
	s.send(h, []byte{1})
	if _, err := c.Write(make([]byte, 25)); err != nil {
		t.Fatal(err)
	}
	for _, want := range []uint32{10, 10, 5} {
		if got, _ := s.expect(opRW, 1); got.length != want {
			t.Fatalf("%d bytes, want %d", got.length, want)
		}
		if want == 10 {
			s.expect(opCreditRequest, 1)
		}
		h = packetOf(opCreditUpdate, 1)
		h.bufAlloc, h.fwdCnt = 10, 10
		if want == 10 {
			s.send(h, nil) // after the first: 10 free again
			h.fwdCnt = 20
		}
		s.send(h, nil)
	}
}

func TestConnectionsAreBounded(t *testing.T) {
	s := newSim(t, featEventIdx)
	for port := uint32(0); port < maxWaitingGuest; port++ {
		s.send(packetOf(opRequest, port), nil)
		s.expect(opResponse, port)
	}
	s.send(packetOf(opRequest, 1000), nil)
	s.expect(opReset, 1000)
	// All are taken in their order, and there is room again.
	for port := uint32(0); port < maxWaitingGuest; port++ {
		s.rw(port, []byte{byte(port)})
		c := s.dial()
		var b [1]byte
		if _, err := c.Read(b[:]); err != nil || b[0] != byte(port) {
			t.Fatalf("the daemon read %v, %v; want %d", b, err, port)
		}
	}
	for port := uint32(2000); port < 2000+maxConns-maxWaitingGuest; port++ {
		s.open(port)
	}
	s.send(packetOf(opRequest, 3000), nil)
	s.expect(opReset, 3000)
}

// TestNoRoomForAnswers is a guest that provokes resets and posts no receive buffer.
func TestNoRoomForAnswers(t *testing.T) {
	s := newSim(t, featEventIdx)
	for range simSize / 2 {
		s.send(packetOf(opRW, 1), nil)
	}
	for range simSize / 2 {
		s.take()
	}
	// The device must come to a halt once it owes as many resets as it keeps.
	taken := 0
	q := s.q[txQueue]
	for range 2 * maxOwedResets {
		s.queue(packetOf(opRW, 1), nil)
		if q.nextAvail-q.lastUsed == simSize {
			break
		}
		s.kick(q)
		if taken < maxOwedResets {
			s.waitUsed(q)
			taken++
		}
	}
	if taken != maxOwedResets || s.hasUsed(q) {
		t.Fatalf("the device took %d packets whose answers had no room, want %d", taken, maxOwedResets)
	}
	// With room it goes on and has lost none.
	for range taken + int(q.nextAvail-q.lastUsed) {
		s.post(4096)
		s.kick(s.q[rxQueue])
		if h, _ := s.take(); h.op != opReset {
			t.Fatalf("packet %v", h)
		}
	}
}

// TestStopAndContinue is QEMU's stop and cont: connections live on.
func TestStopAndContinue(t *testing.T) {
	s := newSim(t, featEventIdx)
	c := s.open(1)
	rx, tx := s.stopRings()
	if _, err := c.Write([]byte("meanwhile")); err != nil {
		t.Fatal(err)
	}
	s.memTable()
	s.startRings(rx, tx)
	if _, p := s.expect(opRW, 1); string(p) != "meanwhile" {
		t.Fatalf("the guest read %q", p)
	}
	s.rw(1, []byte("x"))
	if _, err := c.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
}

// TestDriverStartsAnew is a guest whose kernel was reset: connections end, new ones work.
func TestDriverStartsAnew(t *testing.T) {
	s := newSim(t, featEventIdx)
	c := s.open(1)
	s.stopRings()
	clear(s.mem)
	for _, q := range s.q {
		_ = unix.Close(q.kick)
		_ = unix.Close(q.call)
	}
	s.q = [numQueues]*driverQueue{}
	s.startRings(0, 0)
	if _, err := c.Read(make([]byte, 1)); err != io.EOF {
		t.Fatalf("the daemon read %v, want EOF", err)
	}
	_ = s.open(1)
}

// TestLastWords are packets that QEMU's end overtook.
func TestLastWords(t *testing.T) {
	for _, how := range []string{"stopped rings", "killed"} {
		t.Run(how, func(t *testing.T) {
			s := newSim(t, featEventIdx)
			c := s.open(1)
			for range 2 {
				h := packetOf(opRW, 1)
				h.length = maxPayload / 2
				s.queue(h, make([]byte, h.length)) // and no kick
			}
			if how == "stopped rings" {
				s.stopRings()
			}
			_ = unix.Shutdown(s.control, unix.SHUT_RDWR)
			if got, err := io.ReadAll(c); err != nil || len(got) != maxPayload {
				t.Errorf("the daemon read %d bytes of %d, %v", len(got), maxPayload, err)
			}
			if err := s.ended(); err != nil {
				t.Errorf("the device ended with: %v", err)
			}
		})
	}
}

func TestMemoryTakenAway(t *testing.T) {
	s := newSim(t, featEventIdx)
	if err := unix.Ftruncate(s.memFD, 0); err != nil {
		t.Fatal(err)
	}
	one := [8]byte{1}
	if _, err := unix.Write(s.q[txQueue].kick, one[:]); err != nil {
		t.Fatal(err)
	}
	if err := s.ended(); err == nil {
		t.Error("the device ended well")
	}
	// Mapped but not there: the cleanup doesn't touch it.
}
