package e2e

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// Ten at once; the leak check says what is left afterwards.
func TestTenParallelRuns(t *testing.T) {
	const crowd = 10
	both(t, func(t *testing.T, w wall) {
		var wg sync.WaitGroup
		for i := range crowd {
			wg.Go(func() {
				r := w.Run(busybox, "sh", "-c", fmt.Sprintf("echo %d; echo written > /file; exit %d", i, 10+i)).Run()
				if r.Code != 10+i || r.Stdout != fmt.Sprintf("%d\n", i) {
					t.Errorf("run %d: exit code %d, wrote %q; stderr: %s", i, r.Code, r.Stdout, r.Stderr)
				}
			})
		}
		wg.Wait()
		if out := w.Call(t, "ps", "-a", "-q").Stdout; out != "" {
			t.Errorf("workloads are left: %s", out)
		}
	})
}

// Both kinds side by side, and nothing of either in the host's mount table while they run.
func TestNothingInTheHostsMountTable(t *testing.T) {
	d := shared
	d.Watch(t)
	before, err := harness.ListMounts(d)
	must(t, err)
	for _, iso := range isolations {
		w := d.Wall(iso)
		id := w.Start(t, busybox, "sleep", "600")
		w.Exec(id, "true").Run().Want(t, 0)
	}
	after, err := harness.ListMounts(d)
	must(t, err)
	if a, b := strings.Join(after, "\n"), strings.Join(before, "\n"); a != b {
		t.Errorf("before:\n%s\nwhile running:\n%s", b, a)
	}
}

// Several daemons with directories of their own do not know of each other.
func TestTwoDaemons(t *testing.T) {
	other := ownDaemon(t)
	other.Watch(t)
	shared.Watch(t)
	for _, iso := range isolations {
		for _, d := range []*daemon{shared, other} {
			w := d.Wall(iso)
			id := w.Start(t, "--name", "same-name-"+iso, busybox, "sh", "-c", "echo "+d.Name+"; exec sleep 600")
			d.WaitForLog(t, id, d.Name)
		}
	}
	a, b := shared.Call(t, "ps", "-q").Stdout, other.Call(t, "ps", "-q").Stdout
	if len(strings.Fields(a)) != 2 || len(strings.Fields(b)) != 2 {
		t.Errorf("one daemon lists %q, the other %q; want two each", a, b)
	}
	for _, id := range strings.Fields(a) {
		other.Command("inspect", id).Run().WantError(t, 125, "no workload")
	}
	must(t, other.Terminate())
	for _, iso := range isolations {
		shared.Call(t, "exec", "same-name-"+iso, "true")
	}
	other.MustStart(t)
	for _, iso := range isolations {
		other.Call(t, "exec", "same-name-"+iso, "true")
	}
	// A third with the directories of a living one is refused.
	third, err := harness.NewDaemon("third", "--run-dir", other.RunDir, "--state-dir", other.StateDir)
	must(t, err)
	if err := third.Start(); err == nil || !strings.Contains(err.Error(), "another sandboxd") {
		t.Errorf("a second daemon on the same directories: %v", err)
	}
	must(t, third.Discard())
}
