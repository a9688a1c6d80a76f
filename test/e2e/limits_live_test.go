package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// limitStatus is what inspect says of limits and of what came of them.
type limitStatus struct {
	Spec struct {
		Resources struct {
			CPUMillis   uint32 `json:"cpuMillis"`
			MemoryBytes string `json:"memoryBytes"`
			Pids        uint32 `json:"pids"`
		}
	}
	Status struct {
		State     string
		Message   string
		OOMKilled bool `json:"oomKilled"`
		OOM       struct {
			Where      string
			LimitBytes string `json:"limitBytes"`
			PeakBytes  string `json:"peakBytes"`
		}
	}
}

func limitsOf(t *testing.T, d *daemon, id string) (s limitStatus) {
	t.Helper()
	out := d.Call(t, "inspect", id).Stdout
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatalf("cannot read inspect: %v\n%s", err, out)
	}
	return s
}

// A counter stands still while it is paused, also when the daemon is killed meanwhile, and goes on from where it was.
func TestPauseAndResume(t *testing.T) {
	d := ownDaemon(t)
	d.Watch(t)
	ids := map[string]string{}
	for _, iso := range isolations {
		ids[iso] = d.Wall(iso).Start(t, busybox, "sh", "-c", counterScript)
	}
	for _, iso := range isolations {
		d.WaitForLog(t, ids[iso], "5\n")
		d.Call(t, "pause", ids[iso])
		if s := limitsOf(t, d, ids[iso]); s.Status.State != "WORKLOAD_STATE_PAUSED" {
			t.Fatalf("%s: paused, it is %s", iso, s.Status.State)
		}
		d.Command("exec", ids[iso], "true").Run().WantError(t, 125, "paused", "resume")
	}
	if table := d.Call(t, "ps").Stdout; strings.Count(table, "(paused)") != len(isolations) {
		t.Errorf("ps does not say which are paused:\n%s", table)
	}
	before := map[string]harness.Usage{}
	for _, iso := range isolations {
		before[iso] = d.Usage(t, ids[iso])
	}
	must(t, d.Kill())
	<-time.After(time.Second)
	d.MustStart(t)
	for _, iso := range isolations {
		if s := limitsOf(t, d, ids[iso]); s.Status.State != "WORKLOAD_STATE_PAUSED" {
			t.Errorf("%s: after the daemon's death it is %s", iso, s.Status.State)
		}
		if used := cpuTime(t, d.Usage(t, ids[iso])) - cpuTime(t, before[iso]); used != 0 {
			t.Errorf("%s: paused, it used %s of processor time", iso, used)
		}
		d.Call(t, "resume", ids[iso])
		d.Call(t, "exec", ids[iso], "touch", "/stop")
		d.Call(t, "wait", ids[iso]).WantOut(t, "9\n")
		wantCounted(t, d.Call(t, "logs", ids[iso]).Stdout)
	}
}

func TestPausedIsStoppedKilledAndRemoved(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sh", "-c", "trap 'exit 5' TERM; echo ready; while :; do sleep 0.1; done")
		for _, end := range []struct {
			args []string
			code string
		}{{[]string{"stop"}, "5\n"}, {[]string{"kill"}, "137\n"}} {
			w.WaitForLog(t, id, "ready\n")
			w.Call(t, "pause", id)
			w.Call(t, append(end.args, id)...)
			w.Call(t, "wait", id).WantOut(t, end.code)
			w.Call(t, "start", id)
			w.Call(t, "exec", id, "true")
		}
		w.Call(t, "pause", id)
		w.Call(t, "rm", "-f", id)
	})
}

func TestUpdateWhileRunning(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, "--cpus", "1", "--memory", "128m", "--pids", "64", busybox, "sh", "-c", "while :; do :; done")
		w.Call(t, "update", "--cpus", "0.2", "--cpuset-cpus", "0", id)
		before, began := w.Usage(t, id), time.Now()
		<-time.After(3 * time.Second)
		used, passed := cpuTime(t, w.Usage(t, id))-cpuTime(t, before), time.Since(began)
		if share := used.Seconds() / passed.Seconds(); share > 0.35 || used == 0 {
			t.Errorf("used %s of %s after an update to 0.2 processors", used, passed)
		}
		if w.Isolation == "vm" {
			w.Command("update", "--memory", "256m", id).Run().WantError(t, 125, "memory", "booted")
			w.Command("update", "--cpus", "2", id).Run().WantError(t, 125, "processors", "booted")
		} else {
			w.Call(t, "update", "--memory", "96m", "--pids", "32", id)
			if u := w.Usage(t, id); u.MemoryLimit != fmt.Sprint(96<<20) {
				t.Errorf("the limit of memory is %s", u.MemoryLimit)
			}
			w.Command("update", "--memory", "16m", "--disk", "64m", id).Run().WantError(t, 125, "layer")
		}
		// Stopped, anything may change, for the next start.
		w.Call(t, "stop", "--grace", "0", id)
		w.Call(t, "update", "--memory", "192m", "--cpus", "0.5", id)
		if r := limitsOf(t, w.Daemon, id).Spec.Resources; r.MemoryBytes != fmt.Sprint(192<<20) || r.CPUMillis != 500 {
			t.Errorf("inspect says %+v", r)
		}
	})
}

func TestOutOfMemoryIsSaid(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		neighbour := w.Start(t, "--isolation", "container", busybox, "sleep", "600")
		id := w.Start(t, "--memory", "96m", busybox, "sh", "-c", "x=$(tr '\\0' y </dev/zero); echo survived")
		w.Call(t, "wait", id)
		s := limitsOf(t, w.Daemon, id).Status
		where := map[string]string{"container": "WHERE_CONTAINER", "vm": "WHERE_GUEST"}[w.Isolation]
		if !s.OOMKilled || s.OOM.Where != where || s.OOM.LimitBytes == "" || s.OOM.PeakBytes == "" || !strings.Contains(s.Message, "out of memory") {
			t.Errorf("status says %+v", s)
		}
		w.Call(t, "exec", neighbour, "echo", "unharmed").WantOut(t, "unharmed\n")
	})
}

// What the host's kernel kills of a VM is its monitor: that is told apart from a kill within the guest. It takes a monitor that
// outgrows what it is given; here the limit of its cgroup is lowered to what it uses, which only the host's owner can.
func TestOutOfMemoryOfTheMonitorIsSaid(t *testing.T) {
	w := shared.Wall("vm")
	w.Daemon.Watch(t)
	neighbour := shared.Wall("container").Start(t, busybox, "sleep", "600")
	id := w.Start(t, "--memory", "128m", busybox, "sh", "-c", "while [ ! -e /go ]; do sleep 0.1; done; dd if=/dev/zero of=/dev/shm/fill bs=1M; echo survived; sleep 600")
	w.Exec(id, "true").Run().Want(t, 0)
	group := w.Group(t, id, "memory")
	limitFile := filepath.Join(group, "memory.max")
	if _, err := os.Stat(limitFile); err != nil {
		limitFile = filepath.Join(group, "memory.limit_in_bytes")
	}
	limit := number(t, w.Usage(t, id).MemoryBytes) + 8<<20
	must(t, os.WriteFile(limitFile, []byte(fmt.Sprint(limit)), 0o600))
	w.Exec(id, "touch", "/go").Run()
	w.Command("wait", id).Run().WantError(t, 125, "no exit code", "out of memory: VM and VMM together")
	s := limitsOf(t, w.Daemon, id).Status
	if !s.OOMKilled || s.OOM.Where != "WHERE_VMM" || !strings.Contains(s.Message, "VM and VMM together") {
		t.Errorf("status says %+v", s)
	}
	if got := number(t, s.OOM.LimitBytes); got > limit || got < limit-1<<20 {
		t.Errorf("the limit was %d, status says %d", limit, got)
	}
	w.Call(t, "exec", neighbour, "echo", "unharmed").WantOut(t, "unharmed\n")
}

// The log keeps its limit, whatever is written, and says what it dropped; the newest is there.
func TestLogFloodIsBounded(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, "--log-size", "1m", busybox, "sh", "-c", "yes 0123456789abcde | head -c 8388608; echo; echo the end")
		w.Call(t, "wait", id).WantOut(t, "0\n")
		r := w.Call(t, "logs", id)
		if len(r.Stdout) > 1<<20 || len(r.Stdout) < 256<<10 || !strings.HasSuffix(r.Stdout, "\nthe end\n") {
			t.Errorf("kept %d bytes, which end in %q", len(r.Stdout), harness.Abridged(r.Stdout[max(0, len(r.Stdout)-20):]))
		}
		var dropped int
		if _, err := fmt.Sscanf(r.Stderr, "sandboxctl: %d bytes of output are gone", &dropped); err != nil || dropped+len(r.Stdout) != 8388608+9 {
			t.Errorf("kept %d, and logs says %q", len(r.Stdout), r.Stderr)
		}
		w.Call(t, "logs", "--tail", "1", id).WantOut(t, "the end\n")
	})
}
