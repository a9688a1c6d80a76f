package e2e

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

func hostKernel(t *testing.T) string {
	t.Helper()
	release, err := harness.Output(exec.Command("uname", "-r"))
	must(t, err)
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	must(t, err)
	return string(release) + string(boot)
}

func TestMemoryLimit(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		hog := "a = []\nwhile len(a) < 1024: a.append(bytearray(1 << 20))\nprint('got a gigabyte')"
		r := w.Run("--memory", "128m", debian, "python3", "-c", hog).Run()
		if r.Code != 137 || r.Stdout != "" {
			t.Errorf("1 GiB within 128 MiB: exit code %d, stdout %q, stderr %q; want 137", r.Code, r.Stdout, r.Stderr)
		}
		// Who stays below is not bothered.
		w.Run("--memory", "128m", debian, "python3", "-c", "a = bytearray(40 << 20); print(len(a))").Run().WantOut(t, "41943040\n")
	})
}

func TestPidsLimit(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		r := w.Run("--pids", "32", busybox, "sh", "-c", "for i in $(seq 100); do sleep 600 & done; echo all started").Run()
		if r.Code == 0 || strings.Contains(r.Stdout, "all started") || !strings.Contains(r.Stderr, "fork") {
			t.Errorf("100 processes within 32: exit code %d, stdout %q, stderr %q", r.Code, r.Stdout, r.Stderr)
		}
		w.Run("--pids", "32", busybox, "sh", "-c", "for i in $(seq 10); do sleep 600 & done; echo all started").Run().WantOut(t, "all started\n")
	})
}

func TestDiskLimit(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		r := w.Run("--disk", "32m", busybox, "dd", "if=/dev/zero", "of=/big", "bs=1M", "count=64").Run()
		if r.Code == 0 || !strings.Contains(r.Stderr, "No space left") {
			t.Errorf("64 MiB onto 32: exit code %d, stderr %q", r.Code, r.Stderr)
		}
		w.Run("--disk", "32m", busybox, "sh", "-c", "dd if=/dev/zero of=/fits bs=1M count=16 2>/dev/null && stat -c %s /fits").Run().WantOut(t, "16777216\n")
	})
}

func TestCPULimitAndStats(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, "--cpus", "0.25", "--memory", "128m", "--disk", "64m", busybox, "sh", "-c", "echo ready; while :; do :; done")
		w.WaitForLog(t, id, "ready\n")
		before, began := w.Usage(t, id), time.Now()
		// A process may use a quarter of what passes; that it never uses nothing either says that the counter counts.
		eventually(t, 30*time.Second, "processor time is counted", func() (bool, string) {
			u := w.Usage(t, id)
			return time.Since(began) > 4*time.Second && cpuTime(t, u) > cpuTime(t, before), u.CPUTime
		})
		after := w.Usage(t, id)
		used, passed := cpuTime(t, after)-cpuTime(t, before), time.Since(began)
		if share := used.Seconds() / passed.Seconds(); share > 0.40 {
			t.Errorf("used %s of %s with --cpus 0.25: a share of %.2f", used, passed, share)
		}
		for _, c := range []struct {
			what, value string
			least       uint64
		}{
			{"memoryBytes", after.MemoryBytes, 100 << 10},
			{"memoryLimitBytes", after.MemoryLimit, 128 << 20},
			{"pids", after.Pids, 1},
			{"diskLimitBytes", after.DiskLimit, 64 << 20},
		} {
			if n, err := strconv.ParseUint(c.value, 10, 64); err != nil || n < c.least {
				t.Errorf("%s is %q, want at least %d", c.what, c.value, c.least)
			}
		}
		table := w.Call(t, "stats", "--no-stream").Stdout
		if !strings.Contains(table, id[:12]) {
			t.Errorf("stats does not show %s:\n%s", id[:12], table)
		}
	})
}

func cpuTime(t *testing.T, u harness.Usage) time.Duration {
	t.Helper()
	return duration(t, u.CPUTime)
}

// duration is one of stats, which leaves it out at zero.
func duration(t *testing.T, value string) time.Duration {
	t.Helper()
	if value == "" {
		return 0
	}
	d, err := time.ParseDuration(value)
	if err != nil {
		t.Fatalf("a duration of stats is %q", value)
	}
	return d
}
