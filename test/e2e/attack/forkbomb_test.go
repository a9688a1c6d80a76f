package attack

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// Where the workload may fork until the agent has no thread left to get, a fork bomb ends its own sandbox: what TestForkBomb of
// test/e2e shows not to happen is the work of the room that is left to the agent.
func TestForkBombControl(t *testing.T) {
	d := weakDaemon(t, buildWeak(t), "room for the agent")
	harness.Must(t, d.Import(harness.Debian))
	w := d.Wall("container")
	id := w.Start(t, "--cpus", "1", "--memory", "512m", "--pids", "32", harness.Debian, "python3", "-c", harness.Bomb)
	w.WaitForLog(t, id, "ready\n")
	w.Exec(id, "touch", "/bomb").Run().Want(t, 0)
	w.WaitForLog(t, id, "full\n")
	harness.Eventually(t, time.Minute, "its sandbox ends", func() (bool, string) {
		var callers sync.WaitGroup
		for range 64 { // each wants something of the agent
			callers.Go(func() { w.Exec(id, "true").Run() })
		}
		callers.Wait()
		v := w.Inspect(t, id)
		return v.Status.State == "WORKLOAD_STATE_FAILED", fmt.Sprint(v.Status.State, ": ", v.Status.Message)
	})
}
