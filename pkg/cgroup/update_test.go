package cgroup

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// file reads a file of a group: v1's of a hierarchy, or v2's.
func file(t *testing.T, g *Group, v1Path, v2Name string) string {
	t.Helper()
	path := filepath.Join(root, g.path, v2Name)
	if Mode() != ModeV2 {
		hierarchy, name, _ := strings.Cut(v1Path, "/")
		path = filepath.Join(root, hierarchy, g.path, name)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}

// group makes one for a test, deleted at its end.
func group(t *testing.T, l Limits) *Group {
	t.Helper()
	parent := testParent(t)
	g, err := New(parent, "a", l)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Delete(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return g
}

func TestLimitsChangeWhileRunning(t *testing.T) {
	g := group(t, Limits{CPUMillis: 1000, MemoryBytes: 64 << 20, Pids: 16})
	pid, wait := start(t, g, "while :; do sleep 0.05; done")
	defer wait()
	defer syscall.Kill(pid, syscall.SIGKILL) //nolint:errcheck // the test's own child
	for _, step := range []struct {
		l    Limits
		want map[[2]string]string
	}{
		{Limits{CPUMillis: 250, CPUWeight: 500, MemoryBytes: 32 << 20, Pids: 8, CPUSet: "0"}, map[[2]string]string{
			{"cpu/cpu.cfs_quota_us", "cpu.max"}:                       "25000",
			{"cpu/cpu.shares", "cpu.weight"}:                          "",
			{"memory/memory.limit_in_bytes", "memory.max"}:            "33554432",
			{"pids/pids.max", "pids.max"}:                             "8",
			{"cpuset/cpuset.cpus", "cpuset.cpus"}:                     "0",
			{"cpuset/cpuset.effective_cpus", "cpuset.cpus.effective"}: "0",
		}},
		// Upwards again, and back to every processor.
		{Limits{CPUMillis: 2000, MemoryBytes: 128 << 20, Pids: 32}, map[[2]string]string{
			{"cpu/cpu.cfs_quota_us", "cpu.max"}:            "200000",
			{"memory/memory.limit_in_bytes", "memory.max"}: "134217728",
			{"pids/pids.max", "pids.max"}:                  "32",
		}},
	} {
		if err := g.CheckUpdate(step.l); err != nil {
			t.Fatal(err)
		}
		for range 2 { // idempotent
			if err := g.Update(step.l); err != nil {
				t.Fatal(err)
			}
		}
		for files, want := range step.want {
			if got := file(t, g, files[0], files[1]); want != "" && got != want && !strings.HasPrefix(got, want+" ") {
				t.Errorf("%v is %q, want %q", files, got, want)
			}
		}
	}
	weight := uint64(500)
	if err := g.Update(Limits{CPUMillis: 2000, CPUWeight: uint32(weight), MemoryBytes: 128 << 20}); err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprint(weight)
	if Mode() != ModeV2 {
		want = fmt.Sprint(weightShares(uint32(weight)))
	}
	if got := file(t, g, "cpu/cpu.shares", "cpu.weight"); got != want {
		t.Errorf("weight is %s, want %s", got, want)
	}
	// A process that was there before the cpuset is in it, and one that came back from it may run everywhere.
	var set unix.CPUSet
	if err := unix.SchedGetaffinity(pid, &set); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile("/sys/devices/system/cpu/online")
	if err != nil {
		t.Fatal(err)
	}
	online, err := parseCPUs(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	if set.Count() != len(online) {
		t.Errorf("after the cpuset was lifted the process may run on %d processors of %d", set.Count(), len(online))
	}
	if err := g.Update(Limits{CPUMillis: 2000, MemoryBytes: 128 << 20, CPUSet: "0"}); err != nil {
		t.Fatal(err)
	}
	if err := unix.SchedGetaffinity(pid, &set); err != nil || set.Count() != 1 || !set.IsSet(0) {
		t.Errorf("with cpuset 0 the process may run on %d processors, %v", set.Count(), err)
	}
}

// Less memory than is in use would kill with v2 and fail half-way with v1: it is refused before anything changes.
func TestLessMemoryThanUsedIsRefused(t *testing.T) {
	g := group(t, Limits{MemoryBytes: 128 << 20})
	_, wait := start(t, g, "x=$(head -c 24000000 /dev/zero | tr '\\0' y); echo ${#x} >/dev/null; sleep 600")
	defer wait()
	defer g.Kill() //nolint:errcheck // Delete does again
	deadline := time.Now().Add(time.Minute)
	for {
		u, err := g.Usage()
		if err != nil {
			t.Fatal(err)
		}
		if u.MemoryWorkingSetBytes > 20<<20 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the hog uses %d bytes only", u.MemoryWorkingSetBytes)
		}
		time.Sleep(10 * time.Millisecond)
	}
	err := g.CheckUpdate(Limits{MemoryBytes: 16 << 20})
	if spec.KindOf(err) != spec.KindWrongState || !strings.Contains(err.Error(), "uses") {
		t.Errorf("less memory than is used: %v", err)
	}
}

// What the host has no means for is refused by name; nothing is dropped.
func TestUnenforceableIsRefused(t *testing.T) {
	disk := "/"
	tests := map[string]Limits{
		"processor": {CPUSet: "0,8000"},
		"disk":      {IO: IO{Disk: "/proc", ReadBPS: 1 << 20}},
	}
	if Mode() != ModeV2 {
		tests["memory_high"] = Limits{MemoryHighBytes: 32 << 20}
		tests["oom_group"] = Limits{OOMGroup: true}
		tests["io_write"] = Limits{IO: IO{Disk: disk, WriteBPS: 1 << 20}}
	}
	for word, l := range tests {
		err := Check(l)
		if spec.KindOf(err) != spec.KindWrongState || spec.ReasonOf(err) != spec.ReasonUnsatisfiable || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", word, err)
		}
	}
}

func TestV2OnlyLimits(t *testing.T) {
	if Mode() != ModeV2 {
		t.Skip("the host has no cgroup v2 with controllers; the test host runs this one")
	}
	g := group(t, Limits{MemoryBytes: 64 << 20, MemoryHighBytes: 48 << 20, OOMGroup: true})
	for name, want := range map[string]string{"memory.high": "50331648", "memory.oom.group": "1", "memory.swap.max": "0"} {
		if got := file(t, g, "", name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if err := g.Update(Limits{MemoryBytes: 64 << 20, SwapBytes: 8 << 20}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"memory.high": "max", "memory.oom.group": "0", "memory.swap.max": "8388608"} {
		if got := file(t, g, "", name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	if u, err := g.Usage(); err != nil || u.MemoryPressure == nil || u.CPUPressure == nil || u.IOPressure == nil {
		t.Errorf("no pressure in %+v, %v", u, err)
	}
}

// counted runs a script in a group and answers with how long it took and what the group then counts.
func counted(t *testing.T, g *Group, script string) (time.Duration, spec.Usage) {
	t.Helper()
	began := time.Now()
	_, wait := start(t, g, script)
	if ws := wait(); ws.ExitStatus() != 0 {
		t.Fatalf("%s: %v", script, ws)
	}
	took := time.Since(began)
	u, err := g.Usage()
	if err != nil {
		t.Fatal(err)
	}
	return took, u
}

func TestIOLimitBitesAndIsCounted(t *testing.T) {
	dir, err := os.MkdirTemp(".", "io-") // on a disk: the system's directory for such things may be in memory
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if _, err := diskOf(dir); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "data")
	const size = 4 << 20
	if err := os.WriteFile(path, make([]byte, size), 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := os.OpenFile(path, os.O_RDWR, 0); err != nil || out.Sync() != nil || out.Close() != nil {
		t.Fatal("cannot write the file back", err)
	}
	io := IO{Disk: dir, ReadBPS: 1 << 20}
	g := group(t, Limits{MemoryBytes: 64 << 20, IO: io})
	took, u := counted(t, g, "exec dd if="+path+" of=/dev/null bs=64k iflag=direct")
	// 4 MiB at 1 MiB a second; the kernel lets the first slice through.
	if took < 2*time.Second {
		t.Errorf("read %d bytes in %v with a limit of 1 MiB a second", size, took)
	}
	if u.IOReadBytes < size || u.IOReadBytes > size+size/4 || u.IOReads == 0 {
		t.Errorf("counted %d bytes in %d reads, %d were read", u.IOReadBytes, u.IOReads, size)
	}
	io.ReadBPS = 0
	if err := g.Update(Limits{MemoryBytes: 64 << 20, IO: io}); err != nil {
		t.Fatal(err)
	}
	if lifted, _ := counted(t, g, "exec dd if="+path+" of=/dev/null bs=64k iflag=direct"); lifted > took/2 {
		t.Errorf("without the limit it took %v, with it %v", lifted, took)
	}
	if err := g.Update(Limits{MemoryBytes: 64 << 20, IO: IO{Disk: dir, WriteBPS: 1 << 20, Direct: true}}); err != nil {
		t.Fatal(err)
	}
	writes := []struct{ what, dd string }{{"past the page cache", "dd if=/dev/zero of=" + path + " bs=64k count=64 oflag=direct conv=notrunc"}}
	if Mode() == ModeV2 {
		// What is put off counts too, if the group was the first to write the file.
		writes = append(writes, struct{ what, dd string }{"a file of its own", "dd if=/dev/zero of=" + path + ".new bs=64k count=64 conv=fsync"})
	}
	for _, w := range writes {
		before, err := g.Usage()
		if err != nil {
			t.Fatal(err)
		}
		took, u = counted(t, g, "exec "+w.dd)
		if took < 2*time.Second {
			t.Errorf("%s: wrote %d bytes in %v with a limit of 1 MiB a second", w.what, size, took)
		}
		if n := u.IOWriteBytes - before.IOWriteBytes; n < size || n > 2*size {
			t.Errorf("%s: counted %d bytes written, %d were", w.what, n, size)
		}
	}
}

func TestFreeze(t *testing.T) {
	g := group(t, Limits{Pids: 64})
	out := filepath.Join(t.TempDir(), "ticks")
	_, wait := start(t, g, "while :; do echo x >>"+out+"; sleep 0.01; done")
	ticks := func() int64 {
		st, err := os.Stat(out)
		if err != nil {
			return 0
		}
		return st.Size()
	}
	grows := func() bool {
		before := ticks()
		for deadline := time.Now().Add(30 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			if ticks() > before {
				return true
			}
		}
		return false
	}
	if !grows() {
		t.Fatal("nothing runs")
	}
	for range 2 {
		if err := g.Freeze(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	// Another that is free, and does the same, gets to its end meanwhile.
	before := ticks()
	free, err := New(filepath.Dir(g.path), "free", Limits{Pids: 64})
	if err != nil {
		t.Fatal(err)
	}
	_, waitFree := start(t, free, "i=0; while [ $i -lt 20 ]; do i=$((i+1)); sleep 0.01; done")
	if ws := waitFree(); ws.ExitStatus() != 0 {
		t.Fatal(ws)
	}
	if err := free.Delete(t.Context()); err != nil {
		t.Fatal(err)
	}
	if after := ticks(); after != before {
		t.Errorf("frozen, it wrote %d bytes", after-before)
	}
	// Another daemon finds it and lets it go on.
	again, err := Load(filepath.Dir(g.path), "a")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := again.Thaw(); err != nil {
			t.Fatal(err)
		}
	}
	if !grows() {
		t.Error("thawed, it does not go on")
	}
	// What stands still can be killed and deleted.
	if err := g.Freeze(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := g.Kill(); err != nil {
		t.Fatal(err)
	}
	if ws := wait(); ws.Signal() != syscall.SIGKILL {
		t.Errorf("killed while frozen: %v", ws)
	}
}

// A known load: half a second of one processor, and memory that is touched.
func TestUsageOfAKnownLoad(t *testing.T) {
	g := group(t, Limits{MemoryBytes: 128 << 20, Pids: 16})
	var rusage syscall.Rusage
	pid, _ := start(t, g, "x=$(head -c 16000000 /dev/zero | tr '\\0' y); i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done")
	var ws syscall.WaitStatus
	if _, err := syscall.Wait4(pid, &ws, 0, &rusage); err != nil {
		t.Fatal(err)
	}
	u, err := g.Usage()
	if err != nil {
		t.Fatal(err)
	}
	// Of the shell and the children it waited for: the kernel's own account of the same processes.
	used := time.Duration(rusage.Utime.Nano() + rusage.Stime.Nano())
	if low, high := used*8/10, used*12/10+50*time.Millisecond; u.CPUTime < low || u.CPUTime > high {
		t.Errorf("counted %v of processor time, the processes say %v", u.CPUTime, used)
	}
	if u.MemoryPeakBytes < 16000000 || u.MemoryPeakBytes > 128<<20 {
		t.Errorf("peak of %d bytes after 16 MB were in use", u.MemoryPeakBytes)
	}
	if u.OOMKills != 0 {
		t.Errorf("%d kills for memory", u.OOMKills)
	}
}

func TestOOMIsCounted(t *testing.T) {
	g := group(t, Limits{MemoryBytes: 16 << 20, Pids: 16})
	_, wait := start(t, g, "x=$(tr '\\0' y </dev/zero)")
	ws := wait()
	u, err := g.Usage()
	if err != nil {
		t.Fatal(err)
	}
	if ws.Signal() != syscall.SIGKILL || u.OOMKills != 1 || u.MemoryPeakBytes > u.MemoryLimitBytes || u.MemoryPeakBytes < 15<<20 {
		t.Errorf("after %v: %d kills, peak %d, limit %d", ws, u.OOMKills, u.MemoryPeakBytes, u.MemoryLimitBytes)
	}
}
