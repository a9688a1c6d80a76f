package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

const mib = 1 << 20

// load does one known thing at each line it is sent.
const load = `
import os, subprocess, sys, time
held, children = [], []
os.mkfifo("/do")
print("ready", flush=True)
while True:
    with open("/do") as f: what, n, step = f.readline().split()
    n = int(n)
    if what == "burn":
        end = time.process_time() + n
        while time.process_time() < end: pass
    if what == "hold":
        held.append(bytearray(n << 20))
        for i in range(0, n << 20, 4096): held[-1][i] = 1
    if what == "drop": held.clear()
    if what == "spawn": children += [subprocess.Popen(["sleep", "600"]) for _ in range(n)]
    if what == "write":
        with open("/known", "wb") as f:
            for _ in range(n): f.write(os.urandom(1 << 20))
            f.flush()
            os.fsync(f.fileno())
    print("done", step, flush=True)
`

// stats, of a load that is known, behind both walls; the numbers are the host's, of the cgroup.
func TestStatsOfAKnownLoad(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, "--memory", "256m", "--pids", "64", debian, "python3", "-c", load)
		s := loaded{t: t, w: w, id: id, began: time.Now()}
		w.WaitForLog(t, id, "ready\n")
		container := w.Isolation == "container"

		// Processor time: of a container what the process itself was given; of a VM what the kernel's own account of QEMU and
		// its helper says, since under emulation a guest's clock is not the time it was given.
		before, hostBefore := s.usage(), s.hostTime()
		s.do("burn 1")
		after := s.usage()
		want := time.Second
		if !container {
			want = s.hostTime() - hostBefore
		}
		got := cpuTime(t, after) - cpuTime(t, before)
		s.within("processor time, ms", got.Milliseconds(), want.Milliseconds()*9/10, want.Milliseconds()*13/10+300)

		// Memory: 64 MiB held, in the working set, and in the peak also after they are dropped.
		before = s.usage()
		s.do("hold 64")
		after = s.usage()
		least := int64(60 * mib)
		if !container {
			least = 40 * mib // some of it the guest had touched before
			s.within("guest's available memory, less by", number(t, before.GuestAvailable)-number(t, after.GuestAvailable), 56*mib, 90*mib)
		}
		s.within("memory", number(t, after.MemoryBytes)-number(t, before.MemoryBytes), least, 90*mib)
		s.within("working set", number(t, after.MemoryWorkingSet)-number(t, before.MemoryWorkingSet), least, 90*mib)
		held := number(t, after.MemoryBytes)
		s.do("drop 0")
		after = s.usage()
		s.within("peak", number(t, after.MemoryPeak), held, number(t, after.MemoryLimit))
		if container { // a guest's pages stay QEMU's
			s.within("memory given back", held-number(t, after.MemoryBytes), 60*mib, 90*mib)
		}

		// A file: 24 MiB written and kept in the cache; of a VM in the guest's, which is QEMU's memory.
		before = s.usage()
		s.do("write 24")
		after = s.usage()
		if container {
			s.within("cache", number(t, after.MemoryCache)-number(t, before.MemoryCache), 24*mib, 60*mib)
		}
		s.written(after, before, 24*mib)

		// Processes: of a container its own; of a VM QEMU's and the helper's, never the guest's.
		before = s.usage()
		s.do("spawn 10")
		after = s.usage()
		if container {
			s.within("processes", number(t, after.Pids)-number(t, before.Pids), 10, 10)
		} else {
			s.within("threads of the VMM", number(t, after.Pids), 2, 128)
			s.within("threads of the VMM, counted by hand", number(t, after.Pids)-s.threads(), -2, 2) // its I/O threads come and go
		}

		s.pressure()
	})
}

// What a guest has written to its disk and QEMU has not yet put onto the host's is counted all the same, by QEMU.
func TestStatsOfAGuestsWrites(t *testing.T) {
	const size = 24 * mib
	w := shared.Wall("vm")
	w.Daemon.Watch(t)
	id := w.Start(t, "--memory", "128m", busybox, "sleep", "600")
	s := loaded{t: t, w: w, id: id}
	// Past the guest's own page cache, and without asking for it to reach the disk.
	w.Exec(id, "dd", "if=/dev/zero", "of=/known", "bs=1M", fmt.Sprint("count=", size/mib), "oflag=direct").Run().Want(t, 0)
	after := s.usage()
	s.within("bytes written", number(t, after.IOWriteBytes), size, 2*size) // few before
	w.Call(t, "pause", id)
	s.within("bytes written once it is paused", number(t, s.usage().IOWriteBytes), number(t, after.IOWriteBytes), number(t, after.IOWriteBytes)+size)
}

// It is throttled for long enough to compare, or has burned so many seconds.
const (
	enoughThrottled = 500 * time.Millisecond
	mostBurns       = 20
)

// pressure: of a host that has PSI, how long a load with a tenth of a processor waits for the rest of it, which is also the time that
// its quota took. Without PSI there must be none. Disks are TestIOLimit's.
func (s *loaded) pressure() {
	s.t.Helper()
	s.w.Call(s.t, "update", "--cpus", "0.1", s.id)
	before := s.usage()
	after := before
	var throttled time.Duration
	// Where others are busy, too, it may be given less than its quota, and be throttled seldom.
	for range mostBurns {
		s.do("burn 1")
		after = s.usage()
		if throttled = duration(s.t, after.CPUThrottled) - duration(s.t, before.CPUThrottled); throttled >= enoughThrottled {
			break
		}
	}
	for _, p := range []*harness.Pressure{after.MemoryPressure, after.IOPressure} {
		p.Some(s.t)
	}
	then, ok := before.CPUPressure.Some(s.t)
	now, _ := after.CPUPressure.Some(s.t)
	s.t.Logf("throttled for %v", throttled)
	if !ok {
		return
	}
	// At a tenth of the speed it waits nine times as long as it runs, or longer where others are busy, too. A VM is
	// several threads, each of them throttled, and one that runs keeps the others' waiting from being all of the group's.
	least := throttled / 2
	if throttled < enoughThrottled {
		s.t.Errorf("throttled for %v: this test tests nothing", throttled)
	}
	s.within("waited for a processor, ms", (now - then).Milliseconds(), least.Milliseconds(), (time.Since(s.began) + time.Second).Milliseconds())
}

func number(t *testing.T, value string) int64 {
	t.Helper()
	return harness.Number(t, "a number of stats", value)
}

// loaded is a workload that runs the script load.
type loaded struct {
	t  *testing.T
	w  wall
	id string

	steps int
	began time.Time
}

// do has one thing done.
func (s *loaded) do(what string) {
	s.t.Helper()
	s.steps++
	s.w.Call(s.t, "exec", s.id, "sh", "-c", fmt.Sprintf("echo %s %d >/do", what, s.steps))
	done := fmt.Sprintf("done %d\n", s.steps)
	eventually(s.t, 2*time.Minute, what, func() (bool, string) {
		out := s.w.Call(s.t, "logs", s.id).Stdout
		return strings.Contains(out, done), out
	})
}

func (s *loaded) usage() harness.Usage {
	s.t.Helper()
	return s.w.Usage(s.t, s.id)
}

func (s *loaded) within(what string, got, low, high int64) {
	s.t.Helper()
	s.t.Logf("%s: %d, want %d to %d", what, got, low, high)
	if got < low || got > high {
		s.t.Errorf("%s is %d, want %d to %d", what, got, low, high)
	}
}

// written: a VM's are what QEMU was given by its guest. A container's that are put off have an owner with cgroup v2 only; nobody
// can say of v1's what they should be.
func (s *loaded) written(after, before harness.Usage, size int64) {
	s.t.Helper()
	got := number(s.t, after.IOWriteBytes) - number(s.t, before.IOWriteBytes)
	if s.w.Isolation == "vm" || hasV2() {
		s.within("bytes written", got, size, 2*size)
	}
}

func (s *loaded) groupTasks() []string {
	s.t.Helper()
	b, err := os.ReadFile(filepath.Join(s.w.Group(s.t, s.id, "pids"), "cgroup.procs"))
	must(s.t, err)
	return strings.Fields(string(b))
}

// threads of every process in the cgroup.
func (s *loaded) threads() (n int64) {
	s.t.Helper()
	for _, pid := range s.groupTasks() {
		tasks, err := os.ReadDir(filepath.Join("/proc", pid, "task"))
		must(s.t, err)
		n += int64(len(tasks))
	}
	return n
}

// hostTime is the processor time of every process in the cgroup, by /proc/PID/stat, whose unit is 10 ms.
func (s *loaded) hostTime() (sum time.Duration) {
	s.t.Helper()
	for _, pid := range s.groupTasks() {
		b, err := os.ReadFile(filepath.Join("/proc", pid, "stat"))
		must(s.t, err)
		fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
		for _, ticks := range fields[11:13] { // utime and stime, the 14th and 15th of all
			sum += time.Duration(harness.Number(s.t, "ticks", ticks)) * 10 * time.Millisecond
		}
	}
	return sum
}
