package attack

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

const (
	// rogueMemory is how much a daemon may grow by whatever agents send.
	rogueMemory = 64 << 20
	// rogueWait is how long an agent is called until it breaks the protocol: it does so two seconds after its start.
	rogueWait = 4 * time.Second
)

// rogueWays are what an agent that was taken over does, by the names of pkg/agent/guest, rogue_on.go, and what is then said of its
// sandbox, which is ended.
var rogueWays = []struct {
	name string
	says string // nothing where the sandbox goes on, with calls that wait in vain
	vm   bool   // behind the other transport too
}{
	{"no oversized frames", "an answer of 268435456 bytes", true},
	{"no misordered frames", "an answer to call", false},
	{"no answers to nobody", "an answer to call", false},
	{"no calls instead of answers", "a message of type 1", false},
	{"no garbage", "an answer of", false},
	{"no endless frames", "an answer to call", true},
	{"no frames that never end", "", false},
	{"tell how processes end", "exit code 1073741824", true},
}

func memoryOf(t *testing.T, d *harness.Daemon) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.Cmd.Process.Pid))
	harness.Must(t, err)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmRSS:" {
			kib, err := strconv.Atoi(f[1])
			harness.Must(t, err)
			return kib << 10
		}
	}
	t.Fatal("no VmRSS")
	return 0
}

// goRogue starts a workload whose agent breaks the protocol, calls it, and answers with what calls said and the daemon's most memory.
func goRogue(t *testing.T, w harness.Wall, way string) (id string, said []string, most int) {
	t.Helper()
	id = w.Start(t, "-e", weakenVariable+"="+way, hostile, "/attack", "sleep")
	for until := time.Now().Add(rogueWait); time.Now().Before(until); time.Sleep(100 * time.Millisecond) {
		call := w.Exec(id, "/attack", "true")
		call.Timeout = 5 * time.Second
		r := call.Run()
		if r.Code != 0 {
			said = append(said, strings.TrimSpace(r.Stderr))
		}
		most = max(most, memoryOf(t, w.Daemon))
		if strings.Contains(r.Stderr, "is failed, not running") {
			break // it was found out
		}
	}
	return id, said, most
}

// An agent that was taken over does its worst: the daemon stays as large as it was and answers, so do neighbours, and the
// workload can be looked at and removed.
func TestRogueAgent(t *testing.T) {
	d, without := weakened(t)
	importHostile(t, d, hostileImage(t, buildPayload(t)))
	neighbour := d.Wall("container").Start(t, hostile, "/attack", "sleep")
	before := memoryOf(t, d)
	for _, iso := range harness.Isolations {
		w := d.Wall(iso)
		t.Run(iso, func(t *testing.T) {
			for _, way := range rogueWays {
				if iso == "vm" && !way.vm {
					continue
				}
				t.Run(strings.ReplaceAll(way.name, " ", "-"), func(t *testing.T) {
					t.Parallel()
					id, said, most := goRogue(t, w, way.name)
					v := d.Inspect(t, id)
					t.Logf("%d calls failed, the last with %q; %s %q; the daemon grew by %d KiB", len(said), last(said), v.Status.State, v.Status.Message, (most-before)>>10)
					if len(said) == 0 {
						t.Error("no call failed")
					}
					if most-before > rogueMemory {
						t.Errorf("the daemon grew from %d KiB to %d", before>>10, most>>10)
					}
					if err := foundOut(v, way.says); err != nil {
						t.Error(err)
					}
					d.Call(t, "exec", neighbour, "/attack", "euid").WantOut(t, "0\n")
					d.Call(t, "rm", "-f", id)
				})
			}
		})
	}
	t.Run("without the bound", func(t *testing.T) {
		without("bound answers")
		before := memoryOf(t, d)
		if _, _, most := goRogue(t, d.Wall("container"), "no oversized frames"); most-before <= rogueMemory {
			t.Errorf("the daemon grew by no more than %d KiB: the check finds nothing", (most-before)>>10)
		}
	})
	t.Run("without a count of calls", func(t *testing.T) {
		without("match answers with calls")
		id, _, _ := goRogue(t, d.Wall("container"), "no endless frames")
		if foundOut(d.Inspect(t, id), "an answer to call") == nil {
			t.Error("it is found out all the same: the check finds nothing")
		}
	})
}

// foundOut: a sandbox whose agent broke the protocol is ended, and what is said of it is that; with nothing to say it goes on.
func foundOut(v harness.View, says string) error {
	if says == "" {
		if v.Status.State != "WORKLOAD_STATE_RUNNING" {
			return fmt.Errorf("it is %s, %q", v.Status.State, v.Status.Message)
		}
		return nil
	}
	if v.Status.State != "WORKLOAD_STATE_FAILED" || !strings.Contains(v.Status.Message, "agent broke the protocol: "+says) {
		return fmt.Errorf("it is %s, and %q does not say that its agent sent %s", v.Status.State, v.Status.Message, says)
	}
	return nil
}

func last(said []string) string {
	if len(said) == 0 {
		return ""
	}
	return said[len(said)-1]
}
