package cgroup

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// patience bounds what waits for a counter.
const patience = 2 * time.Minute

// groups makes several below one parent, deleted at the end at the latest.
func groups(t *testing.T, limits ...Limits) (all []*Group) {
	t.Helper()
	parent := testParent(t)
	for i, l := range limits {
		g, err := New(parent, "g"+strconv.Itoa(i), l)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := g.Delete(context.Background()); err != nil {
				t.Error(err)
			}
		})
		all = append(all, g)
	}
	return all
}

// usage of a group.
func usage(t *testing.T, g *Group) spec.Usage {
	t.Helper()
	u, err := g.Usage()
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// Two groups that want one processor share it by their weights: what each was given is counted, not how long it took.
func TestWeightsShareOneProcessor(t *testing.T) {
	const together = 3 * time.Second
	for _, c := range []struct {
		heavy, light uint32
		low, high    float64
	}{{400, 100, 2.5, 6}, {200, 200, 0.7, 1.4}} { // the second: without a difference there is none
		all := groups(t, Limits{CPUWeight: c.heavy, CPUSet: "0", Pids: 8}, Limits{CPUWeight: c.light, CPUSet: "0", Pids: 8})
		for _, g := range all {
			start(t, g, "while :; do :; done")
		}
		// From when both run.
		began := [2]time.Duration{}
		var got [2]time.Duration
		for deadline := time.Now().Add(patience); got[0]+got[1] < together; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("only %v of processor time", got)
			}
			for i, g := range all {
				used := usage(t, g).CPUTime
				if began[0] == 0 || began[1] == 0 {
					began[i] = used
					continue
				}
				got[i] = used - began[i]
			}
		}
		if ratio := float64(got[0]) / float64(got[1]); ratio < c.low || ratio > c.high {
			t.Errorf("weights %d and %d: %v and %v of one processor, a ratio of %.2f; want %.1f to %.1f", c.heavy, c.light, got[0], got[1], ratio, c.low, c.high)
		} else {
			t.Logf("weights %d and %d: a ratio of %.2f", c.heavy, c.light, ratio)
		}
		for _, g := range all {
			if err := g.Delete(context.Background()); err != nil {
				t.Error(err)
			}
		}
	}
}

// needV2 skips where the host has no cgroup v2 with controllers.
func needV2(t *testing.T) {
	t.Helper()
	if Mode() != ModeV2 {
		t.Skip("the host has no cgroup v2 with controllers; the test host runs this one")
	}
}

// event is a counter of memory.events.
func event(t *testing.T, g *Group, name string) int {
	t.Helper()
	for line := range strings.Lines(file(t, g, "", "memory.events")) {
		if key, value, _ := strings.Cut(strings.TrimSpace(line), " "); key == name {
			n, err := strconv.Atoi(value)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("memory.events has no %s", name)
	return 0
}

// Above memory.high a group waits for memory, which is counted, and stays near it; the same load without it does neither.
func TestMemoryHighSlowsDown(t *testing.T) {
	needV2(t)
	const high, size, slack = 24 << 20, 40 << 20, 8 << 20
	// Memory that cannot be reclaimed, a little above: the kernel has each of its growths wait, and ends nothing.
	const hold = "x=$(head -c 26000000 /dev/zero | tr '\\0' y); : ${#x}"
	for _, limit := range []uint64{high, 0} {
		all := groups(t, Limits{MemoryBytes: 128 << 20, MemoryHighBytes: limit, Pids: 16}, Limits{MemoryBytes: 128 << 20, MemoryHighBytes: limit, Pids: 16})
		cache, held := all[0], all[1]
		dir, err := os.MkdirTemp(".", "high-") // on a disk: what is in memory is not given up
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		path := filepath.Join(dir, "file")
		_, wait := start(t, cache, "exec dd if=/dev/zero of="+path+" bs=1M count="+strconv.Itoa(size>>20))
		if ws := wait(); ws.ExitStatus() != 0 {
			t.Fatal(ws)
		}
		peak, events := usage(t, cache).MemoryPeakBytes, event(t, cache, "high")
		_, wait = start(t, held, hold)
		if ws := wait(); ws.ExitStatus() != 0 {
			t.Fatal(ws)
		}
		waited := usage(t, held).MemoryPressure.SomeTotal
		t.Logf("memory.high %d: a file of %d: peak %d, %d times above; held memory: waited %v", limit, size, peak, events, waited)
		if limited := peak <= high+slack && events > 0; limited != (limit > 0) {
			t.Errorf("memory.high %d: peak %d, %d times above", limit, peak, events)
		}
		if slowed := event(t, held, "high") > 0 && waited > time.Millisecond; slowed != (limit > 0) {
			t.Errorf("memory.high %d: %d times above, waited %v for memory", limit, event(t, held, "high"), waited)
		}
		for _, g := range all {
			if err := g.Delete(context.Background()); err != nil {
				t.Error(err)
			}
		}
	}
}

// Out of memory, all of a group with OOMGroup end together; of one without, who took the memory.
func TestOOMGroupEndsAll(t *testing.T) {
	needV2(t)
	for _, together := range []bool{true, false} {
		g := groups(t, Limits{MemoryBytes: 24 << 20, OOMGroup: together, Pids: 16})[0]
		_, waitIdle := start(t, g, "exec sleep 600")
		_, waitHog := start(t, g, "x=$(tr '\\0' y </dev/zero)")
		if ws := waitHog(); ws.Signal() != syscall.SIGKILL {
			t.Fatalf("who took all memory: %v", ws)
		}
		if kills := usage(t, g).OOMKills; kills == 0 {
			t.Error("no kill is counted")
		}
		idle := make(chan syscall.WaitStatus, 1)
		go func() { idle <- waitIdle() }()
		if together {
			select {
			case ws := <-idle:
				if ws.Signal() != syscall.SIGKILL {
					t.Errorf("its neighbour in the group: %v", ws)
				}
			case <-time.After(patience):
				t.Error("its neighbour in the group lives on")
			}
		} else {
			// The kill was one act, and it is done.
			select {
			case ws := <-idle:
				t.Errorf("without OOMGroup its neighbour ended, too: %v", ws)
			default:
				pids, err := g.Pids()
				if err != nil || len(pids) == 0 {
					t.Errorf("without OOMGroup nobody is left: %v", err)
				}
			}
		}
		if err := g.Delete(context.Background()); err != nil {
			t.Error(err)
		}
	}
}
