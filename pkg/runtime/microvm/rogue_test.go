package microvm

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
)

// rogue is a guest in which PID 1 itself is hostile.
type rogue struct {
	conn  net.Conn
	lines *bufio.Scanner
	*instance
}

func (b *bench) startRogue(t *testing.T, r *Runtime, memory uint64) *rogue {
	t.Helper()
	s := b.sandbox()
	s.Resources.MemoryBytes = memory
	ctx := testContext(t)
	i, err := r.Start(ctx, s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.remove(t, r, s.ID) })
	conn, err := i.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close() })
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		t.Fatal(err)
	}
	return &rogue{conn: conn, lines: bufio.NewScanner(conn), instance: i.(*instance)}
}

func (g *rogue) do(t *testing.T, command string) string {
	t.Helper()
	if _, err := fmt.Fprintln(g.conn, command); err != nil {
		t.Fatal(err)
	}
	if !g.lines.Scan() {
		t.Fatalf("%s: the guest hung up: %v", command, g.lines.Err())
	}
	return g.lines.Text()
}

// Lesson of CVE-2026-46695 and CVE-2024-34824-like holes: read-only inside the guest alone is not read-only.
func TestARogueGuestCannotWriteTheImage(t *testing.T) {
	b := newBench(t)
	b.useRogue()
	before, err := os.ReadFile(b.image())
	if err != nil {
		t.Fatal(err)
	}
	r := b.runtime(t)
	g := b.startRogue(t, r, guestMemory)
	// It got past its own kernel's guards, and the drive refused.
	if got := g.do(t, "write image"); got != "worked: " {
		t.Errorf("the guest's kernel, made to believe the image is writable: %s", got)
	}
	after, err := os.ReadFile(b.image())
	if err != nil || !bytes.Equal(before, after) {
		t.Errorf("the image changed: sha256 %x before, %x after (%v)", sha256.Sum256(before), sha256.Sum256(after), err)
	}
}

func TestAGuestPanicEndsTheVM(t *testing.T) {
	b := newBench(t)
	b.useRogue()
	r := b.runtime(t)
	g := b.startRogue(t, r, guestMemory)
	if _, err := fmt.Fprintln(g.conn, "panic"); err != nil {
		t.Fatal(err)
	}
	awaitDone(t, g.instance)
}

// TestAGuestMayUseAllItsMemory: the cgroup's limit counts QEMU too, and a guest that keeps its promise must not be killed.
func TestAGuestMayUseAllItsMemory(t *testing.T) {
	b := newBench(t)
	b.useRogue()
	r := b.runtime(t)
	for _, memory := range []uint64{128 << 20, 512 << 20} {
		g := b.startRogue(t, r, memory)
		booted, err := g.Usage()
		if err != nil {
			t.Fatal(err)
		}
		got := g.do(t, "touch memory")
		if !strings.HasPrefix(got, "touched ") {
			t.Fatal(got)
		}
		u, err := g.Usage()
		if err != nil {
			t.Fatal(err)
		}
		overhead := int64(u.MemoryPeakBytes) - int64(memory)
		t.Logf("guest of %d MiB: booted %d MiB, peak %d MiB, overhead %d MiB of %d allowed, %s", memory>>20, booted.MemoryBytes>>20,
			u.MemoryPeakBytes>>20, overhead>>20, vmmOverhead[accelTCG]>>20, got)
		if u.MemoryPeakBytes+16<<20 > u.MemoryLimitBytes {
			t.Errorf("only %d bytes are left to the limit", u.MemoryLimitBytes-u.MemoryPeakBytes)
		}
		b.remove(t, r, g.rec.ID)
	}
}

// TestTheTokenIsForgotten: once booted, nothing on the host's side that the VM's own processes can reach holds the token.
func TestTheInitramfsIsForgotten(t *testing.T) {
	b := newBench(t)
	r := b.runtime(t)
	v := b.start(t, r)
	for _, fd := range globFDs() {
		if !strings.HasPrefix(fd, fmt.Sprintf("/proc/%d/", v.Facts().HostPID)) {
			continue
		}
		if target, err := os.Readlink(fd); err != nil || !strings.Contains(target, "sandboxd-initramfs") {
			continue
		}
		content, err := os.ReadFile(fd)
		if err != nil || len(content) == 0 || len(bytes.Trim(content, "\x00")) != 0 {
			t.Errorf("%s: %d bytes, not all zero (%v)", fd, len(content), err)
		}
		return
	}
	t.Error("QEMU has no initramfs open: this test shows nothing")
}
