package harness

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// No single call of a scenario takes longer, a VM that software emulates on a busy machine included.
const CallTimeout = 3 * time.Minute

var Isolations = []string{"container", "vm"}

// Invocation is a call of sandboxctl.
type Invocation struct {
	daemon  *Daemon
	Args    []string
	stdin   io.Reader
	stdout  io.Writer
	Timeout time.Duration
	// More of it.
	Env  []string
	user uint32
}

type Result struct {
	Args           []string
	Stdout, Stderr string
	Code           int
	Took           time.Duration
}

func (d *Daemon) Command(args ...string) *Invocation {
	return &Invocation{daemon: d, Args: args, Timeout: CallTimeout}
}

// As has another user than root call, whose group has the same number.
func (i *Invocation) As(user uint32) *Invocation {
	i.user = user
	return i
}

func (i *Invocation) WithStdin(r io.Reader) *Invocation {
	i.stdin = r
	return i
}

func (i *Invocation) WithStdout(w io.Writer) *Invocation {
	i.stdout = w
	return i
}

func (i *Invocation) Cmd(ctx context.Context) *exec.Cmd {
	cmd := exec.CommandContext(ctx, sandboxctl, i.Args...)
	cmd.Env = append(append(os.Environ(), "SANDBOXD_ADDRESS="+i.daemon.Address), i.Env...)
	if i.user != 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: i.user, Gid: i.user}}
	}
	cmd.Stdin = i.stdin
	// A stdin that never ends must not keep Wait from returning.
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func (i *Invocation) Run() Result {
	ctx, cancel := context.WithTimeout(context.Background(), i.Timeout)
	defer cancel()
	var out, errOut bytes.Buffer
	cmd := i.Cmd(ctx)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if i.stdout != nil {
		cmd.Stdout = i.stdout
	}
	began := time.Now()
	err := StartChild(cmd)
	if err == nil {
		err = WaitChild(cmd)
	}
	r := Result{Args: i.Args, Stdout: out.String(), Stderr: errOut.String(), Took: time.Since(began)}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		r.Code = -1
		r.Stderr += "\n(sandboxctl took more than " + i.Timeout.String() + " and was killed)"
	case errors.As(err, &exit):
		r.Code = exit.ExitCode()
	case err != nil:
		r.Code = -1
		r.Stderr += "\n(" + err.Error() + ")"
	}
	return r
}

// Call runs sandboxctl with no standard input and wants exit code 0.
func (d *Daemon) Call(t *testing.T, args ...string) Result {
	t.Helper()
	r := d.Command(args...).Run()
	r.Want(t, 0)
	return r
}

// Want fails the test unless the call ended with code.
func (r Result) Want(t *testing.T, code int) {
	t.Helper()
	if r.Code != code {
		t.Fatalf("sandboxctl %s: exit code %d, want %d\nstdout: %s\nstderr: %s",
			strings.Join(r.Args, " "), r.Code, code, Abridged(r.Stdout), Abridged(r.Stderr))
	}
}

// WantOut fails the test unless the call ended well and wrote exactly out.
func (r Result) WantOut(t *testing.T, out string) {
	t.Helper()
	r.Want(t, 0)
	if r.Stdout != out {
		t.Fatalf("sandboxctl %s wrote %q, want %q\nstderr: %s", strings.Join(r.Args, " "), Abridged(r.Stdout), Abridged(out), Abridged(r.Stderr))
	}
}

// WantError fails the test unless sandboxctl failed with code and said, in one line on stderr, each of words.
func (r Result) WantError(t *testing.T, code int, words ...string) {
	t.Helper()
	r.Want(t, code)
	said := strings.TrimSpace(r.Stderr)
	if said == "" || strings.Contains(said, "\n") {
		t.Errorf("sandboxctl %s: want one line on stderr, got %q", strings.Join(r.Args, " "), Abridged(r.Stderr))
	}
	for _, w := range words {
		if !strings.Contains(said, w) {
			t.Errorf("sandboxctl %s: its error %q does not say %q", strings.Join(r.Args, " "), said, w)
		}
	}
	if r.Stdout != "" {
		t.Errorf("sandboxctl %s: wrote %q to stdout beside its error", strings.Join(r.Args, " "), Abridged(r.Stdout))
	}
}

func Abridged(s string) string {
	const most = 2000
	if len(s) <= most {
		return s
	}
	return s[:most/2] + "…" + s[len(s)-most/2:]
}

// Wall is a daemon and the isolation a scenario asks it for.
type Wall struct {
	*Daemon
	Isolation string
}

// Wall is d asked for an isolation.
func (d *Daemon) Wall(isolation string) Wall { return Wall{d, isolation} }

// Both runs a scenario once behind each of d's walls, and looks for leftovers after each.
func Both(t *testing.T, d *Daemon, scenario func(t *testing.T, w Wall)) {
	t.Helper()
	for _, iso := range Isolations {
		t.Run(iso, func(t *testing.T) {
			w := d.Wall(iso)
			w.Watch(t)
			scenario(t, w)
		})
	}
}

// Watch looks for leftovers when the test has cleaned up, and shows the daemon's log if it failed.
func (d *Daemon) Watch(t *testing.T) {
	t.Helper()
	before := TakeSnapshot(t, d)
	t.Cleanup(func() {
		before.WantNothingNew(t, d)
		if t.Failed() {
			t.Log(d.LogTail())
		}
	})
}

// Run is `sandboxctl run --rm` behind this wall.
func (w Wall) Run(args ...string) *Invocation {
	return w.Command(append([]string{"run", "--rm", "--isolation", w.Isolation}, args...)...)
}

// Start is `sandboxctl run -d` behind this wall; the workload is removed after the test.
func (w Wall) Start(t *testing.T, args ...string) (id string) {
	t.Helper()
	return w.id(t, append([]string{"run", "-d"}, args...)...)
}

// Create is `sandboxctl create` behind this wall; the workload is removed after the test.
func (w Wall) Create(t *testing.T, args ...string) (id string) {
	t.Helper()
	return w.id(t, append([]string{"create"}, args...)...)
}

func (w Wall) id(t *testing.T, args ...string) string {
	t.Helper()
	args = append(args[:1:1], append([]string{"--isolation", w.Isolation}, args[1:]...)...)
	r := w.Command(args...).Run()
	r.Want(t, 0)
	id := strings.TrimSpace(r.Stdout)
	if len(id) != 32 || strings.Trim(id, "0123456789abcdef") != "" {
		t.Fatalf("sandboxctl %s printed %q, want an id of 32 hexadecimal digits", strings.Join(args, " "), r.Stdout)
	}
	t.Cleanup(func() {
		if r := w.Command("rm", "-f", id).Run(); r.Code != 0 && !strings.Contains(r.Stderr, "no workload") {
			t.Errorf("cannot remove %s: exit code %d: %s", id, r.Code, r.Stderr)
		}
	})
	return id
}

// Exec is `sandboxctl exec`.
func (w Wall) Exec(id string, command ...string) *Invocation {
	return w.Command(append([]string{"exec", id}, command...)...)
}

// How often we look whether something has come about that tells nobody.
const pollInterval = 50 * time.Millisecond

// Eventually waits until ok says yes, and fails the test with what it said last if it never does.
func Eventually(t *testing.T, within time.Duration, what string, ok func() (bool, string)) {
	t.Helper()
	deadline := time.Now().Add(within)
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for {
		yes, said := ok()
		if yes {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within %s; last seen: %s", what, within, Abridged(said))
		}
		<-tick.C
	}
}
