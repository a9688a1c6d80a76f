package e2e

import (
	"os"
	"testing"
	"time"
)

// hasV2 reports whether this host's controllers are cgroup v2's.
func hasV2() bool {
	_, err := os.Stat("/sys/fs/cgroup/cgroup.controllers")
	return err == nil
}

// Two busy sandboxes on one processor share it by their weights, which update changes: what each was given is counted, not how
// long it took, so that a busy machine changes nothing.
func TestCPUWeight(t *testing.T) {
	const together = 3 * time.Second
	both(t, func(t *testing.T, w wall) {
		var ids [2]string
		for i, weight := range []string{"400", "100"} {
			ids[i] = w.Start(t, "--cpuset-cpus", "0", "--cpu-weight", weight, "--cpus", "1", "--memory", "128m", busybox, "sh", "-c", "echo ready; while :; do :; done")
		}
		for _, id := range ids {
			w.WaitForLog(t, id, "ready\n")
		}
		share := func(what string, low, high float64) {
			t.Helper()
			var began, got [2]time.Duration
			for i, id := range ids {
				began[i] = cpuTime(t, w.Usage(t, id))
			}
			eventually(t, 2*time.Minute, "both have used processor time", func() (bool, string) {
				for i, id := range ids {
					got[i] = cpuTime(t, w.Usage(t, id)) - began[i]
				}
				return got[0]+got[1] >= together, got[0].String() + " and " + got[1].String()
			})
			ratio := float64(got[0]) / float64(got[1])
			t.Logf("%s: %v and %v, a ratio of %.2f", what, got[0], got[1], ratio)
			if ratio < low || ratio > high {
				t.Errorf("%s: %v and %v of one processor, a ratio of %.2f; want %.1f to %.1f", what, got[0], got[1], ratio, low, high)
			}
		}
		share("weights 400 and 100", 2.2, 7)
		w.Call(t, "update", "--cpu-weight", "100", ids[0])
		share("weights 100 and 100", 0.6, 1.7)
	})
}

// Out of memory, all of a workload with --oom-group ends; of one without, the process that took the memory.
func TestOOMGroup(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		// A file in memory and one read into one buffer: a shell that grows a variable takes half a minute in an
		// emulated guest, long enough for the kernel to give up on a victim that is slow to die and kill the shell too.
		const script = "dd if=/dev/zero of=/dev/shm/held bs=1M count=60 && dd if=/dev/zero of=/dev/null bs=60M count=1; echo survived $?"
		run := func(flags ...string) *invocation {
			return w.Run(append(flags, "--memory", "96m", busybox, "sh", "-c", script)...)
		}
		run().Run().WantOut(t, "survived 137\n")
		if w.Isolation == "container" && !hasV2() {
			run("--oom-group").Run().WantError(t, 125, "oom_group", "cgroup v1")
			w.Run("--memory-high", "64m", busybox, "true").Run().WantError(t, 125, "memory_high", "cgroup v1")
			return
		}
		if r := run("--oom-group").Run(); r.Code != 137 || r.Stdout != "" {
			t.Errorf("with --oom-group: exit code %d, %q, %q", r.Code, r.Stdout, r.Stderr)
		}
	})
}
