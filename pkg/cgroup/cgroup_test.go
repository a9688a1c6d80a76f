package cgroup

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// testParent is a parent group of this test process alone, gone when the test is over.
func testParent(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to make cgroups: run the tests as root")
	}
	parent := fmt.Sprintf("/sandboxd-test-%d/%s", os.Getpid(), strings.ReplaceAll(t.Name(), "/", "-"))
	t.Cleanup(func() {
		ids, err := List(parent)
		if err != nil || len(ids) > 0 {
			t.Errorf("cgroups left: %v, %v", ids, err)
		}
		if err := errors.Join(RemoveParent(parent), RemoveParent(filepath.Dir(parent))); err != nil {
			t.Error(err)
		}
	})
	return parent
}

// start runs a shell script in g and answers with its pid and a function that waits for it.
func start(t *testing.T, g *Group, script string) (pid int, wait func() syscall.WaitStatus) {
	t.Helper()
	return startWith(t, g, nil, script)
}

// startWith is start with a descriptor 3.
func startWith(t *testing.T, g *Group, third *os.File, script string) (pid int, wait func() syscall.WaitStatus) {
	t.Helper()
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close() //nolint:errcheck // nothing is written
	err = g.Start(func(attr *syscall.SysProcAttr) error {
		fd := null.Fd()
		files := []uintptr{fd, fd, fd}
		if third != nil {
			files = append(files, third.Fd())
		}
		pid, err = syscall.ForkExec("/bin/sh", []string{"sh", "-c", script}, &syscall.ProcAttr{Files: files, Sys: attr})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return pid, func() syscall.WaitStatus {
		var ws syscall.WaitStatus
		if _, err := syscall.Wait4(pid, &ws, 0, nil); err != nil {
			t.Error(err)
		}
		return ws
	}
}

func TestProcessIsInEveryHierarchyFromItsFirstInstruction(t *testing.T) {
	g, err := New(testParent(t), "a", Limits{CPUMillis: 500, MemoryBytes: 64 << 20, Pids: 16})
	if err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "cgroup")
	_, wait := start(t, g, "cat /proc/self/cgroup >"+out)
	wait()
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	want := 1
	if Mode() != ModeV2 {
		want = len(controllers)
		if Mode() == ModeHybrid {
			want++
		}
	}
	if got := strings.Count(string(b), g.path+"\n"); got < want {
		t.Errorf("in %d hierarchies, want %d:\n%s", got, want, b)
	}
	self, err := os.ReadFile("/proc/self/cgroup")
	if err != nil || strings.Contains(string(self), g.path) {
		t.Errorf("the daemon is in the group: %s, %v", self, err)
	}
	if err := g.Delete(t.Context()); err != nil {
		t.Error(err)
	}
}

// What fn does to its thread (a runtime confines it before it forks) must be seen of no thread of the daemon afterwards.
// Every version's way to start is tried wherever this runs: v2's touches no file.
func TestStartChangesNoThreadOfTheDaemon(t *testing.T) {
	g, err := New(testParent(t), "a", Limits{})
	if err != nil {
		t.Fatal(err)
	}
	confine := func(attr *syscall.SysProcAttr) error {
		if attr == nil {
			t.Error("fn got no attributes")
		}
		if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
			t.Error(err)
		}
		return nil
	}
	for name, start := range map[string]func() error{
		Mode() + " group": func() error { return g.Start(confine) },
		"v2":              func() error { return v2{}.start("", &syscall.SysProcAttr{}, confine) },
	} {
		if err := start(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		deadline := time.Now().Add(20 * time.Second)
		for { // until the thread has ended: Start returns a moment before
			confined := confinedThreads(t)
			if len(confined) == 0 {
				break
			}
			if time.Now().After(deadline) {
				t.Errorf("%s: threads %v of the daemon are confined", name, confined)
				break
			}
		}
	}
	if err := g.Delete(t.Context()); err != nil {
		t.Error(err)
	}
}

// confinedThreads are the threads of this process with no_new_privs.
func confinedThreads(t *testing.T) (threads []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/self/task/*/status")
	if err != nil || len(files) == 0 {
		t.Fatalf("threads %v, %v", files, err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err == nil && !strings.Contains(string(b), "NoNewPrivs:\t0\n") { // an error: it has ended
			threads = append(threads, filepath.Base(filepath.Dir(file)))
		}
	}
	return threads
}

func TestMemoryLimitBites(t *testing.T) {
	g, err := New(testParent(t), "a", Limits{CPUMillis: 1000, MemoryBytes: 16 << 20, Pids: 16})
	if err != nil {
		t.Fatal(err)
	}
	_, wait := start(t, g, "x=$(head -c 100000000 /dev/zero | tr '\\0' x); exit 0")
	if ws := wait(); ws.Exited() && ws.ExitStatus() == 0 {
		t.Error("100 MB fitted into a limit of 16 MiB")
	}
	u, err := g.Usage()
	if err != nil {
		t.Fatal(err)
	}
	if u.MemoryLimitBytes != 16<<20 || u.MemoryPeakBytes < 8<<20 || u.MemoryPeakBytes > 17<<20 || u.CPUTime <= 0 || u.PidsLimit != 16 {
		t.Errorf("usage %+v", u)
	}
	if err := g.Delete(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestPidsLimitBites(t *testing.T) {
	g, err := New(testParent(t), "a", Limits{CPUMillis: 1000, MemoryBytes: 64 << 20, Pids: 4})
	if err != nil {
		t.Fatal(err)
	}
	_, wait := start(t, g, "for i in 1 2 3 4 5 6 7 8; do sleep 100 & done; exit 0")
	if ws := wait(); ws.Exited() && ws.ExitStatus() == 0 {
		t.Error("nine processes fitted into a limit of 4")
	}
	if err := g.Delete(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestOnlyTheNamedDevicesWork(t *testing.T) {
	g, err := New(testParent(t), "a", Limits{Devices: []Device{{1, 3, "null"}, {136, AnyMinor, "terminals"}}})
	if err != nil {
		t.Fatal(err)
	}
	node := filepath.Join(t.TempDir(), "zero")
	if err := unix.Mknod(node, unix.S_IFCHR|0o666, int(unix.Mkdev(1, 5))); err != nil {
		t.Fatal(err)
	}
	for script, want := range map[string]int{
		": </dev/null && echo x >/dev/null":        0,
		": <" + node:                               2,
		"mknod " + node + "2 c 1 3":                1,
		"head -c 1 /dev/urandom":                   1,
		"ls -l " + node + " && ls /dev >/dev/null": 0,
	} {
		_, wait := start(t, g, "exec 2>&1; "+script)
		if ws := wait(); ws.ExitStatus() != want {
			t.Errorf("%q exited with %d, want %d", script, ws.ExitStatus(), want)
		}
	}
	if err := g.Delete(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestDeleteKillsForkersAndIsIdempotent(t *testing.T) {
	parent := testParent(t)
	g, err := New(parent, "a", Limits{CPUMillis: 1000, MemoryBytes: 128 << 20, Pids: 200})
	if err != nil {
		t.Fatal(err)
	}
	pid, wait := start(t, g, "while :; do sh -c 'sleep 100 & sleep 100 & sleep 0.001' & done")
	loaded, err := Load(parent, "a")
	if err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(20 * time.Second)
	for { // until it really forks
		pids, err := loaded.Pids()
		if err != nil {
			t.Fatal(err)
		}
		if len(pids) > 20 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("only %d processes", len(pids))
		}
	}
	// Reap our child while Delete waits, as a daemon does.
	var wg sync.WaitGroup
	wg.Go(func() { wait() })
	for range 2 {
		if err := loaded.Delete(t.Context()); err != nil {
			t.Error(err)
		}
	}
	wg.Wait()
	if err := unix.Kill(pid, 0); !errors.Is(err, unix.ESRCH) {
		t.Errorf("the process is still there: %v", err)
	}
	if err := loaded.Kill(); err != nil {
		t.Errorf("Kill of a deleted group: %v", err)
	}
	if pids, err := g.Pids(); err != nil || len(pids) != 0 {
		t.Errorf("Pids of a deleted group: %v, %v", pids, err)
	}
	if _, err := Load(parent, "a"); spec.KindOf(err) != spec.KindNotFound {
		t.Errorf("Load of a deleted group: %v", err)
	}
}

func TestKillWithoutCgroupKill(t *testing.T) {
	if Mode() == ModeV2 {
		t.Skip("v2 always has cgroup.kill on the kernels sandboxd supports: run this on a host with cgroup v1")
	}
	parent := testParent(t)
	g, err := New(parent, "a", Limits{CPUMillis: 1000, MemoryBytes: 128 << 20, Pids: 100})
	if err != nil {
		t.Fatal(err)
	}
	_, wait := start(t, g, "while :; do sleep 100 & sleep 0.01; kill $!; done")
	dir := v1{}.dirs(g.path)[len(controllers)-1]
	if err := killFrozen(dir); err != nil {
		t.Error(err)
	}
	if ws := wait(); ws.Signal() != unix.SIGKILL {
		t.Errorf("ended with %v, want SIGKILL", ws)
	}
	if err := g.Delete(t.Context()); err != nil {
		t.Error(err)
	}
}

// A forking thread that is still in the group must not make anybody take the daemon for one of its processes.
func TestDaemonIsNeverAProcessOfTheGroup(t *testing.T) {
	parent := testParent(t)
	g, err := New(parent, "a", Limits{MemoryBytes: 64 << 20, Pids: 16})
	if err != nil {
		t.Fatal(err)
	}
	err = g.Start(func(*syscall.SysProcAttr) error {
		if Mode() != ModeV2 {
			b, err := os.ReadFile(filepath.Join(root, "freezer", g.path, "cgroup.procs"))
			if err != nil || !strings.Contains(string(b), strconv.Itoa(os.Getpid())) {
				t.Errorf("the kernel lists %q, %v: this test tests nothing", b, err)
			}
		}
		pids, err := g.Pids()
		if err != nil || len(pids) != 0 {
			t.Errorf("Pids = %v, %v, want none", pids, err)
		}
		return g.Kill()
	})
	if err != nil {
		t.Error(err)
	}
	if err := g.Delete(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestDeleteIsBounded(t *testing.T) {
	parent := testParent(t)
	g, err := New(parent, "a", Limits{Pids: 16})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err = g.Start(func(*syscall.SysProcAttr) error {
		if Mode() == ModeV2 {
			return nil
		}
		if err := g.Delete(ctx); !errors.Is(err, context.Canceled) { // our own thread keeps it busy
			t.Errorf("Delete of a busy group = %v, want context.Canceled", err)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	if err := g.Delete(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestNewRefuses(t *testing.T) {
	for _, id := range []string{"", "..", "a/b", ".hidden", "-", "a b"} {
		if _, err := New("/sandboxd-test-names", id, Limits{}); err == nil {
			t.Errorf("New(%q) succeeded", id)
		}
	}
	if _, err := New("/../x", "a", Limits{}); err == nil {
		t.Error("New took a parent that climbs")
	}
}

func BenchmarkGroup(b *testing.B) {
	parent := fmt.Sprintf("/sandboxd-test-%d", os.Getpid())
	for b.Loop() {
		g, err := New(parent, "a", Limits{CPUMillis: 1000, MemoryBytes: 64 << 20, Pids: 16})
		if err != nil {
			b.Fatal(err)
		}
		if err := g.Delete(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
	if err := RemoveParent(parent); err != nil {
		b.Fatal(err)
	}
}
