package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// What is behind the inner door takes none of the processes that the group has beside, and can be limited, counted, killed and
// deleted with it.
func TestInnerLimitLeavesTheRest(t *testing.T) {
	l := Limits{MemoryBytes: 64 << 20, Pids: 40, InnerPids: 12}
	g := group(t, l)
	door, err := g.InnerDoor()
	if err != nil {
		t.Fatal(err)
	}
	defer door.Close() //nolint:errcheck // nothing more is written
	// The shell enters by itself, as whoever has the door does. The one that it forks ends when it is refused a child.
	refused := filepath.Join(t.TempDir(), "refused")
	hog, waitHog := startWith(t, g, door, "echo 0 >&3; exec 3>&-; (for i in $(seq 60); do sleep 300 & done) 2>/dev/null || : >"+refused+"; exec sleep 300")
	deadline := time.Now().Add(time.Minute)
	for pids := uint64(0); pids < uint64(l.InnerPids)-1 || !exists(refused); {
		u, err := g.Usage()
		if err != nil {
			t.Fatal(err)
		}
		if pids = u.Pids; pids > uint64(l.InnerPids) {
			t.Fatalf("%d processes behind a door for %d", pids, l.InnerPids)
		}
		if time.Now().After(deadline) {
			t.Fatalf("only %d processes", pids)
		}
		time.Sleep(5 * time.Millisecond)
	}
	if _, wait := start(t, g, "sleep 0 && sleep 0 && true"); wait().ExitStatus() != 0 {
		t.Error("outside of the door nothing can be forked")
	}
	// Members of the group, whichever of both they are in.
	if pids, err := g.Pids(); err != nil || len(pids) < int(l.InnerPids)-1 || !strings.Contains(fmt.Sprint(pids), fmt.Sprint(hog)) {
		t.Errorf("processes of the group: %v, %v", pids, err)
	}
	l.InnerPids = 14
	if err := g.Update(l); err != nil {
		t.Error(err)
	}
	dir := innerV2(g.path)
	if Mode() != ModeV2 {
		dir = innerV1(g.path)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "pids.max")); err != nil || string(b) != "14\n" {
		t.Errorf("after an update the limit is %q, %v", b, err)
	}
	if err := g.Kill(); err != nil {
		t.Error(err)
	}
	if ws := waitHog(); ws.Signal() != syscall.SIGKILL {
		t.Errorf("killed with the group: %v", ws)
	}
}
