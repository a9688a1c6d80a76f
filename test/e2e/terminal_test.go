package e2e

import (
	"context"
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// terminal is a person at a terminal: what they type goes in, what they see piles up.
type terminal struct {
	master *os.File
	mu     sync.Mutex
	seen   strings.Builder
	// Closed when the other side has gone.
	done chan struct{}
}

// openTerminal makes a pseudo terminal and gives back both sides.
func openTerminal(t *testing.T, rows, columns uint16) (*terminal, *os.File) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	must(t, err)
	must(t, unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0))
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	must(t, err)
	// Fd above has made the file blocking; the slave's end closing ends the read.
	slave, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	must(t, err)
	p := &terminal{master: master, done: make(chan struct{})}
	p.resize(t, rows, columns)
	go func() {
		defer close(p.done)
		buf := make([]byte, 4096)
		for {
			n, err := master.Read(buf)
			p.mu.Lock()
			p.seen.Write(buf[:n])
			p.mu.Unlock()
			if err != nil {
				return // EIO: the last slave is closed
			}
		}
	}()
	t.Cleanup(func() {
		<-p.done
		must(t, master.Close())
	})
	return p, slave
}

func (p *terminal) resize(t *testing.T, rows, columns uint16) {
	t.Helper()
	must(t, unix.IoctlSetWinsize(int(p.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Row: rows, Col: columns}))
}

func (p *terminal) typeIn(t *testing.T, keys string) {
	t.Helper()
	_, err := p.master.WriteString(keys)
	must(t, err)
}

func (p *terminal) shows(t *testing.T, text string) {
	t.Helper()
	eventually(t, time.Minute, "terminal shows "+text, func() (bool, string) {
		p.mu.Lock()
		defer p.mu.Unlock()
		return strings.Contains(p.seen.String(), text), p.seen.String()
	})
}

// at runs sandboxctl as a person at a terminal would: it is the session's leader, and the terminal is its own.
func (p *terminal) at(t *testing.T, slave *os.File, i *invocation) (exited func() int) {
	t.Helper()
	_, exited = p.started(t, slave, i)
	return exited
}

// started is at, with the process's id.
func (p *terminal) started(t *testing.T, slave *os.File, i *invocation) (pid int, exited func() int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), harness.CallTimeout)
	cmd := i.Cmd(ctx)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
	must(t, harness.StartChild(cmd))
	must(t, slave.Close())
	var once sync.Once
	exited = func() int {
		once.Do(func() {
			_ = harness.WaitChild(cmd)
			cancel()
		})
		return cmd.ProcessState.ExitCode()
	}
	t.Cleanup(func() { exited() })
	return cmd.Process.Pid, exited
}

func TestTerminal(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		for _, c := range []struct {
			what string
			call *invocation
		}{
			{"exec", w.Command("exec", "-i", "-t", id, "sh")},
			{"run", w.Run("-it", busybox, "sh")},
		} {
			p, slave := openTerminal(t, 41, 99)
			exited := p.at(t, slave, c.call)
			p.typeIn(t, "tty; stty size; echo typed-$((6*7))\n")
			p.shows(t, "/dev/pts/")
			p.shows(t, "41 99")
			p.shows(t, "typed-42")
			p.resize(t, 24, 80)
			// The new size travels on its own; ask until it has come.
			eventually(t, 20*time.Second, c.what+": the new size arrives", func() (bool, string) {
				p.typeIn(t, "stty size\n")
				p.mu.Lock()
				defer p.mu.Unlock()
				return strings.Contains(p.seen.String(), "24 80"), p.seen.String()
			})
			// An interrupt is the terminal's inside, not sandboxctl's end.
			// Not before who is to be interrupted says that it is there: while the shell edits a line it takes the key as a key, and
			// between two commands of a line it is the one who is interrupted, and goes on to the second.
			p.typeIn(t, "sh -c 'echo sleeps-$((5*5)); exec sleep 599'\n")
			p.shows(t, "sleeps-25")
			p.typeIn(t, "\x03")
			p.typeIn(t, "echo survived-$((7*7))\n")
			p.shows(t, "survived-49")
			p.typeIn(t, "exit 6\n")
			if code := exited(); code != 6 {
				t.Errorf("%s: exit code %d, want 6", c.what, code)
			}
		}
	})
}

// A terminal inside needs none outside: scripts ask for one to see what a person would.
func TestTerminalWithoutOne(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		r := w.Run("-t", busybox, "sh", "-c", "tty; echo to stderr >&2").Run()
		if r.Code != 0 || r.Stdout != "/dev/pts/0\r\nto stderr\r\n" || r.Stderr != "" {
			t.Errorf("exit code %d, stdout %q, stderr %q; want one stream as a terminal gives it", r.Code, r.Stdout, r.Stderr)
		}
	})
}

func TestAttach(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, "-i", busybox, "sh", "-c", "while read line; do echo got $line; done; exit 11")
		r := w.Command("attach", id).WithStdin(strings.NewReader("one\ntwo\n")).Run()
		// The end of our input is the end of its input, and attach ends with its code.
		r.Want(t, 11)
		if r.Stdout != "got one\ngot two\n" {
			t.Errorf("attach wrote %q", r.Stdout)
		}
	})
}
