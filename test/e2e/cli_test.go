package e2e

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

// No single call of a scenario takes longer, a VM that software emulates on a busy machine included.
const callTimeout = 3 * time.Minute

var isolations = []string{"container", "vm"}

// invocation is a call of sandboxctl.
type invocation struct {
	daemon  *daemon
	args    []string
	stdin   io.Reader
	stdout  io.Writer
	timeout time.Duration
}

type result struct {
	args           []string
	stdout, stderr string
	code           int
	took           time.Duration
}

func (d *daemon) command(args ...string) *invocation {
	return &invocation{daemon: d, args: args, timeout: callTimeout}
}

func (i *invocation) withStdin(r io.Reader) *invocation {
	i.stdin = r
	return i
}

func (i *invocation) withStdout(w io.Writer) *invocation {
	i.stdout = w
	return i
}

func (i *invocation) cmd(ctx context.Context) *exec.Cmd {
	cmd := exec.CommandContext(ctx, sandboxctl, i.args...)
	cmd.Env = append(os.Environ(), "SANDBOXD_ADDRESS="+i.daemon.address)
	cmd.Stdin = i.stdin
	// A stdin that never ends must not keep Wait from returning.
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

func (i *invocation) run() result {
	ctx, cancel := context.WithTimeout(context.Background(), i.timeout)
	defer cancel()
	var out, errOut bytes.Buffer
	cmd := i.cmd(ctx)
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if i.stdout != nil {
		cmd.Stdout = i.stdout
	}
	began := time.Now()
	err := startChild(cmd)
	if err == nil {
		err = waitChild(cmd)
	}
	r := result{args: i.args, stdout: out.String(), stderr: errOut.String(), took: time.Since(began)}
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		r.code = -1
		r.stderr += "\n(sandboxctl took more than " + i.timeout.String() + " and was killed)"
	case errors.As(err, &exit):
		r.code = exit.ExitCode()
	case err != nil:
		r.code = -1
		r.stderr += "\n(" + err.Error() + ")"
	}
	return r
}

// call runs sandboxctl with no standard input and wants exit code 0.
func (d *daemon) call(t *testing.T, args ...string) result {
	t.Helper()
	r := d.command(args...).run()
	r.want(t, 0)
	return r
}

// want fails the test unless the call ended with code.
func (r result) want(t *testing.T, code int) {
	t.Helper()
	if r.code != code {
		t.Fatalf("sandboxctl %s: exit code %d, want %d\nstdout: %s\nstderr: %s",
			strings.Join(r.args, " "), r.code, code, abridged(r.stdout), abridged(r.stderr))
	}
}

// wantOut fails the test unless the call ended well and wrote exactly out.
func (r result) wantOut(t *testing.T, out string) {
	t.Helper()
	r.want(t, 0)
	if r.stdout != out {
		t.Fatalf("sandboxctl %s wrote %q, want %q\nstderr: %s", strings.Join(r.args, " "), abridged(r.stdout), abridged(out), abridged(r.stderr))
	}
}

// wantError fails the test unless sandboxctl failed with code and said, in one line on stderr, each of words.
func (r result) wantError(t *testing.T, code int, words ...string) {
	t.Helper()
	r.want(t, code)
	said := strings.TrimSpace(r.stderr)
	if said == "" || strings.Contains(said, "\n") {
		t.Errorf("sandboxctl %s: want one line on stderr, got %q", strings.Join(r.args, " "), abridged(r.stderr))
	}
	for _, w := range words {
		if !strings.Contains(said, w) {
			t.Errorf("sandboxctl %s: its error %q does not say %q", strings.Join(r.args, " "), said, w)
		}
	}
	if r.stdout != "" {
		t.Errorf("sandboxctl %s: wrote %q to stdout beside its error", strings.Join(r.args, " "), abridged(r.stdout))
	}
}

func abridged(s string) string {
	const most = 2000
	if len(s) <= most {
		return s
	}
	return s[:most/2] + "…" + s[len(s)-most/2:]
}

// wall is a daemon and the isolation a scenario asks it for.
type wall struct {
	*daemon
	isolation string
}

// both runs a scenario once behind each wall of the shared daemon, and looks for leftovers after each.
func both(t *testing.T, scenario func(t *testing.T, w wall)) {
	t.Helper()
	for _, iso := range isolations {
		t.Run(iso, func(t *testing.T) {
			w := wall{shared, iso}
			w.watch(t)
			scenario(t, w)
		})
	}
}

// watch looks for leftovers when the test has cleaned up, and shows the daemon's log if it failed.
func (d *daemon) watch(t *testing.T) {
	t.Helper()
	before := takeSnapshot(t, d)
	t.Cleanup(func() {
		before.wantNothingNew(t, d)
		if t.Failed() {
			t.Log(d.logTail())
		}
	})
}

// run is `sandboxctl run --rm` behind this wall.
func (w wall) run(args ...string) *invocation {
	return w.command(append([]string{"run", "--rm", "--isolation", w.isolation}, args...)...)
}

// start is `sandboxctl run -d` behind this wall; the workload is removed after the test.
func (w wall) start(t *testing.T, args ...string) (id string) {
	t.Helper()
	return w.id(t, append([]string{"run", "-d"}, args...)...)
}

// create is `sandboxctl create` behind this wall; the workload is removed after the test.
func (w wall) create(t *testing.T, args ...string) (id string) {
	t.Helper()
	return w.id(t, append([]string{"create"}, args...)...)
}

func (w wall) id(t *testing.T, args ...string) string {
	t.Helper()
	args = append(args[:1:1], append([]string{"--isolation", w.isolation}, args[1:]...)...)
	r := w.command(args...).run()
	r.want(t, 0)
	id := strings.TrimSpace(r.stdout)
	if len(id) != 32 || strings.Trim(id, "0123456789abcdef") != "" {
		t.Fatalf("sandboxctl %s printed %q, want an id of 32 hexadecimal digits", strings.Join(args, " "), r.stdout)
	}
	t.Cleanup(func() {
		if r := w.command("rm", "-f", id).run(); r.code != 0 && !strings.Contains(r.stderr, "no workload") {
			t.Errorf("cannot remove %s: exit code %d: %s", id, r.code, r.stderr)
		}
	})
	return id
}

// exec is `sandboxctl exec`.
func (w wall) exec(id string, command ...string) *invocation {
	return w.command(append([]string{"exec", id}, command...)...)
}

// How often we look whether something has come about that tells nobody.
const pollInterval = 50 * time.Millisecond

// eventually waits until ok says yes, and fails the test with what it said last if it never does.
func eventually(t *testing.T, within time.Duration, what string, ok func() (bool, string)) {
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
			t.Fatalf("%s: not within %s; last seen: %s", what, within, abridged(said))
		}
		<-tick.C
	}
}
