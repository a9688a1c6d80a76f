package e2e

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

const (
	// latencySamples are taken of a neighbour in each situation.
	latencySamples = 10
	// latencyBound is only sane: whoever waits longer for a neighbour's `true` is being starved.
	latencyBound = 20 * time.Second
)

// latency is how long a neighbour takes to answer: the median and the worst.
func latency(t *testing.T, d *daemon, neighbour string) (median, worst time.Duration) {
	t.Helper()
	var all []time.Duration
	for range latencySamples {
		r := d.Call(t, "exec", neighbour, "true")
		all = append(all, r.Took)
	}
	slices.Sort(all)
	return all[len(all)/2], all[len(all)-1]
}

// One sandbox does its worst; its neighbour, a container, and the daemon answer all the while, and it can be removed.
func TestHostileNeighbour(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		neighbour := w.Daemon.Wall("container").Start(t, busybox, "sleep", "600")
		id := w.Start(t, "--cpus", "1", "--memory", "128m", "--pids", "128", "--log-size", "1m", busybox, "sh", "-c",
			"while [ ! -e /flood ]; do sleep 0.1; done; yes flood & y=$!; while [ ! -e /bomb ]; do sleep 0.1; done; kill $y; b() { b | b & b; }; b")
		say := func(what string) {
			median, worst := latency(t, w.Daemon, neighbour)
			t.Logf("%s: the neighbour's exec takes %v, at worst %v", what, median, worst)
			if worst > latencyBound {
				t.Errorf("%s: the neighbour waited %v", what, worst)
			}
		}
		say("nothing yet")
		// Descriptors: its own limit stops it.
		r := w.Exec(id, "sh", "-c", "ulimit -n 256; i=3; while eval \"exec $i</dev/null\"; do i=$((i+1)); done").Run()
		if r.Code == 0 || !strings.Contains(r.Stderr, "Too many open files") && !strings.Contains(r.Stderr, "Bad file descriptor") {
			t.Errorf("descriptors without end: exit code %d, stderr %q", r.Code, harness.Abridged(r.Stderr))
		}
		say("descriptors used up")
		w.Exec(id, "sh", "-c", "mkdir /many && cd /many && seq 100000 | xargs -n 5000 touch && ls | wc -l").Run().WantOut(t, "100000\n")
		say("100,000 files in a directory")
		w.Exec(id, "touch", "/flood").Run().Want(t, 0)
		say("a flood of output")
		w.Exec(id, "touch", "/bomb").Run().Want(t, 0)
		eventually(t, time.Minute, "the bomb is at its limit, or has ended its own sandbox", func() (bool, string) {
			state := w.Inspect(t, id).Status.State
			said := w.Call(t, "logs", "--tail", "20", id)
			return state != "WORKLOAD_STATE_RUNNING" || strings.Contains(said.Stdout+said.Stderr, "fork"), state + ": " + harness.Abridged(said.Stderr)
		})
		say("a fork bomb")
		w.Call(t, "rm", "-f", id)
		w.Call(t, "exec", neighbour, "echo", "unharmed").WantOut(t, "unharmed\n")
	})
}
