package e2e

import (
	"fmt"
	"strings"
	"sync"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// Callers at once, each of whom has the agent start something in the full sandbox: more than it may have threads. Under emulation
// that takes minutes, so that a VM has fewer.
var bombCallers = map[string]int{"container": 128, "vm": 16}

// A fork bomb ends no sandbox, its own included: PID 1 goes on and answers, what can't be started is said to be so, and the workload
// is stopped as any other, with its own exit code.
func TestForkBomb(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, "--cpus", "1", "--memory", "512m", "--pids", "32", debian, "python3", "-c", harness.Bomb)
		w.WaitForLog(t, id, "ready\n")
		w.Exec(id, "touch", "/bomb").Run().Want(t, 0)
		w.WaitForLog(t, id, "full\n")
		var mu sync.Mutex
		answers := map[string]int{}
		var callers sync.WaitGroup
		for i := range bombCallers[w.Isolation] {
			callers.Go(func() {
				command := w.Exec(id, "true")
				if i%4 == 0 {
					command = w.Command("cp", id+":/etc/passwd", "-")
				}
				r := command.Run()
				mu.Lock()
				defer mu.Unlock()
				switch said := strings.TrimSpace(r.Stderr); {
				case r.Code == 0:
					answers["done"]++
				case r.Code == 125 && strings.Contains(said, "limit of processes") && !strings.Contains(said, "\n"):
					answers["refused"]++
				default:
					t.Errorf("%q: exit code %d, %q", r.Args, r.Code, said)
				}
			})
		}
		callers.Wait()
		t.Logf("answers of a full sandbox: %v", answers)
		if answers["refused"] == 0 {
			t.Error("nothing was refused: the sandbox was not full, and this test shows nothing")
		}
		if s := w.Inspect(t, id).Status; s.State != "WORKLOAD_STATE_RUNNING" {
			t.Fatalf("it is %s: %s", s.State, s.Message)
		}
		w.Call(t, "stop", "--grace", "2m", id)
		w.Call(t, "wait", id).WantOut(t, "7\n")
		// What was full is as good as before.
		w.Call(t, "start", id)
		w.Exec(id, "echo", "again").Run().WantOut(t, "again\n")
		// And what can't be asked to end is killed.
		w.Exec(id, "touch", "/bomb").Run().Want(t, 0)
		eventually(t, harness.LogTimeout, "it is full again", func() (bool, string) {
			r := w.Call(t, "logs", id)
			return strings.Count(r.Stdout, "full\n") == 2, r.Stdout
		})
		w.Call(t, "kill", id)
		w.Call(t, "wait", id).WantOut(t, fmt.Sprintln(128+9))
	})
}
