package e2e

import (
	"encoding/json"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"
)

func hostKernel(t *testing.T) string {
	t.Helper()
	release, err := exec.Command("uname", "-r").Output()
	must(t, err)
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	must(t, err)
	return string(release) + string(boot)
}

func TestMemoryLimit(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		hog := "a = []\nwhile len(a) < 1024: a.append(bytearray(1 << 20))\nprint('got a gigabyte')"
		r := w.run("--memory", "128m", debian, "python3", "-c", hog).run()
		if r.code != 137 || r.stdout != "" {
			t.Errorf("1 GiB within 128 MiB: exit code %d, stdout %q, stderr %q; want 137", r.code, r.stdout, r.stderr)
		}
		// Who stays below is not bothered.
		w.run("--memory", "128m", debian, "python3", "-c", "a = bytearray(40 << 20); print(len(a))").run().wantOut(t, "41943040\n")
	})
}

func TestPidsLimit(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		r := w.run("--pids", "32", busybox, "sh", "-c", "for i in $(seq 100); do sleep 600 & done; echo all started").run()
		if r.code == 0 || strings.Contains(r.stdout, "all started") || !strings.Contains(r.stderr, "fork") {
			t.Errorf("100 processes within 32: exit code %d, stdout %q, stderr %q", r.code, r.stdout, r.stderr)
		}
		w.run("--pids", "32", busybox, "sh", "-c", "for i in $(seq 10); do sleep 600 & done; echo all started").run().wantOut(t, "all started\n")
	})
}

func TestDiskLimit(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		r := w.run("--disk", "32m", busybox, "dd", "if=/dev/zero", "of=/big", "bs=1M", "count=64").run()
		if r.code == 0 || !strings.Contains(r.stderr, "No space left") {
			t.Errorf("64 MiB onto 32: exit code %d, stderr %q", r.code, r.stderr)
		}
		w.run("--disk", "32m", busybox, "sh", "-c", "dd if=/dev/zero of=/fits bs=1M count=16 2>/dev/null && stat -c %s /fits").run().wantOut(t, "16777216\n")
	})
}

// usage is what `stats --format json` says of one workload.
type usage struct {
	ID          string
	CPUTime     string `json:"cpuTime"`
	MemoryBytes string
	MemoryLimit string `json:"memoryLimitBytes"`
	Pids        string
	DiskLimit   string `json:"diskLimitBytes"`
	DiskBytes   string
}

func (d *daemon) usage(t *testing.T, id string) usage {
	t.Helper()
	r := d.call(t, "--format", "json", "stats", "--no-stream", id)
	var u usage
	if err := json.Unmarshal([]byte(r.stdout), &u); err != nil {
		t.Fatalf("cannot read stats: %v\n%s", err, r.stdout)
	}
	return u
}

func TestCPULimitAndStats(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.start(t, "--cpus", "0.25", "--memory", "128m", "--disk", "64m", busybox, "sh", "-c", "echo ready; while :; do :; done")
		w.waitForLog(t, id, "ready\n")
		before, began := w.usage(t, id), time.Now()
		// A process may use a quarter of what passes; that it never uses nothing either says that the counter counts.
		eventually(t, 30*time.Second, "processor time is counted", func() (bool, string) {
			u := w.usage(t, id)
			return time.Since(began) > 4*time.Second && cpuTime(t, u) > cpuTime(t, before), u.CPUTime
		})
		after := w.usage(t, id)
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
		table := w.call(t, "stats", "--no-stream").stdout
		if !strings.Contains(table, id[:12]) {
			t.Errorf("stats does not show %s:\n%s", id[:12], table)
		}
	})
}

func cpuTime(t *testing.T, u usage) time.Duration {
	t.Helper()
	d, err := time.ParseDuration(u.CPUTime)
	if err != nil {
		t.Fatalf("cpuTime %q: %v", u.CPUTime, err)
	}
	return d
}
