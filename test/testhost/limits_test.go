package testhost

import (
	"strings"
	"testing"
)

// testLimits has limits bite in containers of cgroup v2, through the programs: a daemon of its own, which tries out no VM.
func testLimits(t *testing.T, h *Host) {
	const ctl = `export PATH=/data/bin:$PATH SANDBOXD_ADDRESS=unix:///run/limits/sandboxd.sock; set -e
		sandboxctl() { timeout --foreground 100 /data/bin/sandboxctl "$@"; }
`
	h.Must(t, commandPatience, ctl+`
		systemd-run --quiet --unit=sandboxd-limits --property=Delegate=yes --property=KillMode=process \
			/data/bin/sandboxd --vm-accel tcg --listen $SANDBOXD_ADDRESS --state-dir /var/lib/limits --run-dir /run/limits --cgroup-parent limits
		for i in $(seq 200); do sandboxctl version >/dev/null 2>&1 && break; sleep 0.1; done
		sandboxctl image import --name busybox /data/busybox.tar`)

	// Full of processes: PID 1 goes on, refuses, and tells the exit code of a workload that is asked to end.
	got := h.Must(t, testsPatience, ctl+`
		sandboxctl run -d --name full --isolation container --pids 4 --memory 64m busybox sh -c 'trap "exit 7" TERM; sleep 1000 & wait' >/dev/null
		for i in $(seq 40); do sandboxctl exec full sh -c 'sleep 1000 >/dev/null 2>&1 &' >/dev/null 2>&1 || break; done
		for i in $(seq 4); do (sandboxctl exec full sleep 1000 </dev/null >/dev/null 2>&1 &); done
		for i in $(seq 200); do refused=$(sandboxctl exec full true 2>&1 >/dev/null) || break; sleep 0.1; done
		echo "$refused"
		cat /sys/fs/cgroup/limits/*/pids.max /sys/fs/cgroup/limits/*/workload/pids.max /sys/fs/cgroup/limits/*/workload/pids.current
		grep -c . /sys/fs/cgroup/limits/*/workload/cgroup.threads
		cat /sys/fs/cgroup/limits/*/cgroup.type
		sandboxctl stop full; sandboxctl wait full; sandboxctl rm full >/dev/null`)
	lines := strings.Split(strings.TrimSpace(got), "\n")
	if len(lines) < 7 || !strings.Contains(lines[0], "limit of processes") ||
		strings.Join(lines[1:6], " ") != "68 20 20 20 domain threaded" || lines[len(lines)-1] != "7" {
		t.Errorf("a sandbox full of processes:\n%s", got)
	}

	// Above its memory.high it is slowed down, which stats says; out of memory, all of it ends.
	got = h.Must(t, testsPatience, ctl+`
		sandboxctl run -d --name high --isolation container --memory 128m --memory-high 24m busybox sh -c \
			'dd if=/dev/zero of=/big bs=1M count=48 2>/dev/null; echo written; sleep 1000' >/dev/null
		until sandboxctl logs high | grep -q written; do sleep 0.2; done
		cat /sys/fs/cgroup/limits/*/memory.high
		[[ $(cat /sys/fs/cgroup/limits/*/memory.peak) -lt 36000000 ]] && echo below
		awk '$1 == "high" && $2 > 0 { print "above" }' /sys/fs/cgroup/limits/*/memory.events
		sandboxctl update --memory-high 0 high >/dev/null
		cat /sys/fs/cgroup/limits/*/memory.high
		sandboxctl rm -f high >/dev/null
		sandboxctl run -d --name group --isolation container --memory 32m --oom-group busybox sh -c \
			'sleep 1000 & echo started; x=$(tr "\0" y </dev/zero); echo survived; wait' >/dev/null
		sandboxctl wait group 2>&1 || true
		sandboxctl --format json inspect group | grep -E 'oomKilled|WHERE' | tr -d ' ,'
		sandboxctl logs group
		sandboxctl rm -f group >/dev/null
		ls -d /sys/fs/cgroup/limits/*/ 2>/dev/null | wc -l`)
	for _, want := range []string{"25165824\nbelow\nabove\nmax\n", "\"oomKilled\":true", "WHERE_CONTAINER", "started\n0\n"} {
		if !strings.Contains(got, want) {
			t.Errorf("memory: no %q in\n%s", want, got)
		}
	}
	h.Must(t, commandPatience, ctl+`
		systemctl stop sandboxd-limits
		rm -r /var/lib/limits /run/limits`)
}
