package microvm

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/console"
	"github.com/sandboxd/sandboxd/pkg/spec"
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
	return b.startRogueIn(t, r, s)
}

func (b *bench) startRogueIn(t *testing.T, r *Runtime, s spec.Sandbox) *rogue {
	t.Helper()
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

// TestEndsAreExplained: whatever ends a VM, its instance says what it was, and the console's log has the words.
func TestEndsAreExplained(t *testing.T) {
	b := newBench(t)
	b.useRogue()
	r := b.runtime(t)
	say := func(command string) func(*testing.T, *rogue) {
		return func(t *testing.T, g *rogue) {
			if _, err := fmt.Fprintln(g.conn, command); err != nil {
				t.Fatal(err)
			}
		}
	}
	signal := func(which func(record) process, s unix.Signal) func(*testing.T, *rogue) {
		return func(t *testing.T, g *rogue) {
			if err := unix.Kill(which(g.rec).PID, s); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		end  func(*testing.T, *rogue)
		want string
		// On the console; empty if nothing must be.
		logged string
		// By another daemon than the one that started it.
		restarted bool
	}{
		"panic":             {end: say("panic"), want: "the guest's kernel panicked: sysrq triggered crash", logged: "Kernel panic - not syncing"},
		"panic, told later": {end: say("panic"), want: "the guest's kernel panicked: sysrq triggered crash", logged: "Kernel panic - not syncing", restarted: true},
		"triple fault":      {end: say("triple fault"), want: "a triple fault"},
		"restart":           {end: say("restart"), want: "the guest's kernel was told to restart", logged: "reboot: Restarting system"},
		"hostile words":     {end: say("shout"), want: `the guest's kernel panicked: \x1b[2J`, logged: `\x1b[2J`},
		"QEMU crashes":      {end: signal(func(r record) process { return r.QEMU }, unix.SIGKILL), want: "QEMU was ended by signal 9"},
		"killed":            {end: func(t *testing.T, g *rogue) { _ = g.Kill() }, want: "it was killed"},
		"helper crashes":    {end: signal(func(r record) process { return r.Helper }, unix.SIGABRT), want: "the vsock helper exited with code 2: SIGABRT: abort"},
	} {
		t.Run(name, func(t *testing.T) {
			s := b.sandbox()
			s.ConsolePath = filepath.Join(t.TempDir(), "console.log")
			g := b.startRogueIn(t, r, s)
			if strings.HasPrefix(name, "helper") && g.rec.Helper.PID == 0 {
				t.Log("the kernel's vsock needs no helper")
				return
			}
			if c.restarted {
				if err := r.Close(); err != nil {
					t.Fatal(err)
				}
				r = b.runtime(t)
				i, err := r.Attach(testContext(t), s.ID)
				if err != nil {
					t.Fatal(err)
				}
				g.instance = i.(*instance)
			}
			if why := g.Why(); why != "" {
				t.Errorf("while it runs: %q", why)
			}
			c.end(t, g)
			awaitDone(t, g.instance)
			if why := g.Why(); !strings.Contains(why, c.want) {
				t.Errorf("%q, want %q", why, c.want)
			} else {
				t.Log(why)
			}
			var all strings.Builder
			if err := console.Read(s.ConsolePath, func(e console.Entry) error {
				all.WriteString(e.Text + "\n")
				return nil
			}); err != nil || !strings.Contains(all.String(), c.logged) {
				t.Errorf("the log lacks %q: %v\n%s", c.logged, err, all.String())
			}
			b.remove(t, r, s.ID)
		})
	}
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
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/root%s", v.Facts().HostPID, initrdPath))
	if err != nil || len(content) == 0 || len(bytes.Trim(content, "\x00")) != 0 {
		t.Errorf("%d bytes, not all zero (%v)", len(content), err)
	}
}
