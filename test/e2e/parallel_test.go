package e2e

import (
	"fmt"
	"strings"
	"sync"
	"testing"
)

// Ten at once; the leak check says what is left afterwards.
func TestTenParallelRuns(t *testing.T) {
	const crowd = 10
	both(t, func(t *testing.T, w wall) {
		var wg sync.WaitGroup
		for i := range crowd {
			wg.Go(func() {
				r := w.run(busybox, "sh", "-c", fmt.Sprintf("echo %d; echo written > /file; exit %d", i, 10+i)).run()
				if r.code != 10+i || r.stdout != fmt.Sprintf("%d\n", i) {
					t.Errorf("run %d: exit code %d, wrote %q; stderr: %s", i, r.code, r.stdout, r.stderr)
				}
			})
		}
		wg.Wait()
		if out := w.call(t, "ps", "-a", "-q").stdout; out != "" {
			t.Errorf("workloads are left: %s", out)
		}
	})
}

// Both kinds side by side, and nothing of either in the host's mount table while they run.
func TestNothingInTheHostsMountTable(t *testing.T) {
	d := shared
	d.watch(t)
	before, err := listMounts(d)
	must(t, err)
	for _, iso := range isolations {
		w := wall{d, iso}
		id := w.start(t, busybox, "sleep", "600")
		w.exec(id, "true").run().want(t, 0)
	}
	after, err := listMounts(d)
	must(t, err)
	if a, b := strings.Join(after, "\n"), strings.Join(before, "\n"); a != b {
		t.Errorf("before:\n%s\nwhile running:\n%s", b, a)
	}
}

// Several daemons with directories of their own do not know of each other.
func TestTwoDaemons(t *testing.T) {
	other := ownDaemon(t)
	other.watch(t)
	shared.watch(t)
	for _, iso := range isolations {
		for _, d := range []*daemon{shared, other} {
			w := wall{d, iso}
			id := w.start(t, "--name", "same-name-"+iso, busybox, "sh", "-c", "echo "+d.name+"; exec sleep 600")
			d.waitForLog(t, id, d.name)
		}
	}
	a, b := shared.call(t, "ps", "-q").stdout, other.call(t, "ps", "-q").stdout
	if len(strings.Fields(a)) != 2 || len(strings.Fields(b)) != 2 {
		t.Errorf("one daemon lists %q, the other %q; want two each", a, b)
	}
	for _, id := range strings.Fields(a) {
		other.command("inspect", id).run().wantError(t, 125, "no workload")
	}
	must(t, other.terminate())
	for _, iso := range isolations {
		shared.call(t, "exec", "same-name-"+iso, "true")
	}
	other.mustStart(t)
	for _, iso := range isolations {
		other.call(t, "exec", "same-name-"+iso, "true")
	}
	// A third with the directories of a living one is refused.
	third, err := newDaemon("third", "--run-dir", other.runDir, "--state-dir", other.stateDir)
	must(t, err)
	if err := third.start(); err == nil || !strings.Contains(err.Error(), "another sandboxd") {
		t.Errorf("a second daemon on the same directories: %v", err)
	}
	must(t, third.discard())
}
