package e2e

import (
	"encoding/json"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// topScreen is what the last screen of a terminal shows, from the home of the cursor on.
func (p *terminal) topScreen() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	seen := p.seen.String()
	return seen[strings.LastIndex(seen, "\x1b[H")+1:]
}

func (p *terminal) screenHas(t *testing.T, what string, ok func(screen string) bool) {
	t.Helper()
	eventually(t, harness.CallTimeout, what, func() (bool, string) {
		s := p.topScreen()
		return ok(s) && strings.HasSuffix(s, "\x1b[J"), s
	})
}

// topOf is the line of a workload on a screen, in fields.
func topOf(screen, id string) []string {
	for line := range strings.Lines(screen) {
		if f := strings.Fields(line); len(f) > 0 && f[0] == id[:12] {
			return f
		}
	}
	return nil
}

// top at a terminal, behind either wall: it shows who is busy, follows keys and the terminal's size, and gives the terminal back
// however it ends.
func TestTop(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		busy := w.Start(t, "--name", "busy-"+w.Isolation, "--label", "tenant=top", "--cpus", "0.5", busybox, "sh", "-c", "while :; do :; done")
		idle := w.Start(t, "--name", "idle-"+w.Isolation, "--label", "tenant=top", busybox, "sleep", "600")
		for how, end := range map[string]struct {
			do   func(p *terminal, pid int)
			code int
		}{
			"q":       {func(p *terminal, _ int) { p.typeIn(t, "q") }, 0},
			"ctrl-C":  {func(p *terminal, _ int) { p.typeIn(t, "\x03") }, 128 + int(syscall.SIGINT)},
			"SIGTERM": {func(_ *terminal, pid int) { must(t, syscall.Kill(pid, syscall.SIGTERM)) }, 128 + int(syscall.SIGTERM)},
		} {
			p, slave := openTerminal(t, 20, 170)
			before, err := unix.IoctlGetTermios(int(p.master.Fd()), unix.TCGETS)
			must(t, err)
			running, exited := p.started(t, slave, w.Command("top", "--filter", "tenant=top", "--filter", "isolation="+w.Isolation, "--interval", "300ms"))
			p.screenHas(t, "the busy one first, with its share", func(s string) bool {
				f := topOf(s, busy)
				return f != nil && strings.Index(s, busy[:12]) < strings.Index(s, idle[:12]) && strings.Contains(strings.Join(f, " "), "%") &&
					strings.Contains(s, "by cpu") && strings.Contains(s, "running")
			})
			p.typeIn(t, "nr")
			p.screenHas(t, "the other order", func(s string) bool {
				return strings.Contains(s, "by name, reversed") && strings.Index(s, idle[:12]) < strings.Index(s, busy[:12]) && topOf(s, idle) != nil
			})
			p.resize(t, 3, 40)
			p.screenHas(t, "three short lines", func(s string) bool {
				lines := strings.Split(s, "\r\n")
				for _, line := range lines {
					if len(strings.NewReplacer("[H", "", "\x1b[K", "", "\x1b[J", "").Replace(line)) > 40 {
						return false
					}
				}
				return len(lines) == 3
			})
			end.do(p, running)
			if code := exited(); code != end.code {
				t.Errorf("%s: exit code %d, want %d", how, code, end.code)
			}
			p.wasRestored(t, how, before)
		}
	})
}

// The daemon dies: the terminal is given back, and then it is said why.
func TestTopWithoutDaemon(t *testing.T) {
	d := ownDaemon(t)
	p, slave := openTerminal(t, 20, 120)
	before, err := unix.IoctlGetTermios(int(p.master.Fd()), unix.TCGETS)
	must(t, err)
	_, exited := p.started(t, slave, d.Command("top", "--interval", "200ms"))
	p.screenHas(t, "an empty view", func(s string) bool { return strings.Contains(s, "0 workloads") })
	must(t, d.Kill())
	if code := exited(); code != 125 {
		t.Errorf("exit code %d, want 125", code)
	}
	p.wasRestored(t, "daemon gone", before)
	p.shows(t, "\x1b[?1049lsandboxctl: cannot reach sandboxd")
	d.MustStart(t) // it tidies up what it was killed over
}

// wasRestored: the screen, the cursor and the modes of the terminal are what they were.
func (p *terminal) wasRestored(t *testing.T, how string, before *unix.Termios) {
	t.Helper()
	p.shows(t, "\x1b[?7h\x1b[?25h\x1b[?1049l")
	after, err := unix.IoctlGetTermios(int(p.master.Fd()), unix.TCGETS)
	must(t, err)
	if *after != *before {
		t.Errorf("%s: the terminal is left as %+v, was %+v", how, *after, *before)
	}
}

// top without a terminal: tables, or JSON, of both walls at once.
func TestTopPlain(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, "--label", "tenant=plain", "--memory", "128m", busybox, "sh", "-c", "while :; do :; done")
		r := w.Call(t, "top", "-n", "2", "--interval", "500ms", "--filter", "label=tenant=plain")
		if n := strings.Count(r.Stdout, "ISOLATION"); n != 2 || strings.Contains(r.Stdout, "\x1b") {
			t.Errorf("%d tables: %q", n, r.Stdout)
		}
		if f := topOf(r.Stdout, id); len(f) < 3 || f[2] != w.Isolation {
			t.Errorf("line %q in %s", f, r.Stdout)
		}
		var look struct {
			Time      time.Time
			Workloads []struct {
				ID, Isolation, State, Rule, Reason string
				CPUPercent                         float64
				Usage                              struct{ MemoryBytes, MemoryLimitBytes, GuestMemoryTotalBytes string }
			}
		}
		must(t, json.Unmarshal([]byte(w.Call(t, "top", "--once", "--format", "json", "--filter", "tenant=plain").Stdout), &look))
		if len(look.Workloads) != 1 {
			t.Fatalf("%+v", look)
		}
		one := look.Workloads[0]
		if one.ID != id || one.Isolation != w.Isolation || one.State != "running" || one.Rule == "" || one.Reason == "" || one.CPUPercent <= 0 ||
			one.Usage.MemoryBytes == "" || one.Usage.MemoryLimitBytes == "" || (one.Usage.GuestMemoryTotalBytes != "") != (w.Isolation == "vm") {
			t.Errorf("%+v", one)
		}
		w.Command("top", "--once", "--filter", "tenant=nobody").Run().Want(t, 0)
		w.Command("top", "--sort", "size").Run().WantError(t, 125, "--sort")
		w.Command("top", "--interval", "1ms").Run().WantError(t, 125, "--interval")
	})
}
