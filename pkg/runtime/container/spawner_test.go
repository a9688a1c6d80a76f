package container

import (
	"errors"
	"math"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The spawner is a convenience of the daemon's: when it dies, sandboxes go on and the next start has a new one.
func TestSpawnerDies(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	first := mustStart(t, r, h.sandbox(1))
	old := r.spawner.cmd.Process
	if name, err := os.ReadFile("/proc/" + strconv.Itoa(old.Pid) + "/cmdline"); err != nil || strings.Trim(string(name), "\x00") != spawnerName {
		t.Errorf("the spawner is %q, %v", name, err)
	}
	if err := old.Kill(); err != nil {
		t.Fatal(err)
	}
	// Reaped here, so that it is dead for certain; the spawner's own Wait then finds nothing.
	if err := unix.Waitid(unix.P_PID, old.Pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	for n := 2; n < 6; n++ {
		wg.Go(func() {
			i, err := r.Start(t.Context(), h.sandbox(n))
			if err != nil {
				t.Errorf("Start after the spawner died: %v", err)
				return
			}
			want(t, i, "echo new", "new")
		})
	}
	wg.Wait()
	want(t, first, "echo old", "old")
	if r.spawner.cmd.Process.Pid == old.Pid {
		t.Error("the spawner is the old one: this test tests nothing")
	}
	for n := 1; n < 6; n++ {
		mustRemove(t, r, h.sandbox(n).ID)
	}
}

// A daemon whose heap is large starts sandboxes as fast as one whose heap is small: it is not what is forked.
func TestSpawnerIsSmall(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	i := mustStart(t, r, h.sandbox(1))
	status, err := os.ReadFile("/proc/" + strconv.Itoa(i.Facts().HostPID) + "/status")
	if err != nil || !strings.Contains(string(status), "PPid:\t"+strconv.Itoa(r.spawner.cmd.Process.Pid)+"\n") {
		t.Errorf("the agent is no child of the spawner: %s, %v", status, err)
	}
	mustRemove(t, r, h.sandbox(1).ID)
}

// A daemon that the kernel's OOM killer shall spare has sandboxes that it need not spare; one that it shall kill early has
// sandboxes that are. Who may not protect itself (no CAP_SYS_RESOURCE) sees the second half only.
func TestAgentIsNotProtectedFromOOM(t *testing.T) {
	const own = "/proc/self/oom_score_adj"
	was, err := os.ReadFile(own)
	if err != nil {
		t.Fatal(err)
	}
	defer os.WriteFile(own, was, 0) //nolint:errcheck // a test's
	for daemon, want := range map[string]string{"-500": "0", "300": "300"} {
		err := os.WriteFile(own, []byte(daemon), 0)
		if errors.Is(err, unix.EACCES) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		h := newHost(t)
		r := h.daemon(t)
		i := mustStart(t, r, h.sandbox(1))
		score, err := os.ReadFile("/proc/" + strconv.Itoa(i.Facts().HostPID) + "/oom_score_adj")
		if err != nil || strings.TrimSpace(string(score)) != want {
			t.Errorf("a daemon of %s has an agent of %s, %v, want %s", daemon, score, err, want)
		}
		mustRemove(t, r, h.sandbox(1).ID)
	}
}

func TestSpawnerRefusesWhatItDoesNotUnderstand(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close() //nolint:errcheck // a test's
	if _, err := agentOf(t, r, spawnRequest{Base: math.MaxUint32}); err == nil || !strings.Contains(err.Error(), "its ids") {
		t.Errorf("an agent with ids that are none = %v", err)
	}
	if err := r.spawner.send([]byte("{"), unix.UnixRights(int(null.Fd()))); err != nil {
		t.Errorf("send: %v", err)
	}
	i := mustStart(t, r, h.sandbox(1)) // it still works
	want(t, i, "echo works", "works")
	mustRemove(t, r, h.sandbox(1).ID)
}

// agentOf has the spawner fork an agent that nobody's sandbox is, and answers when it has its namespaces.
func agentOf(t *testing.T, r *Runtime, req spawnRequest) (*agentProcess, error) {
	t.Helper()
	program, err := r.agent.open()
	if err != nil {
		t.Fatal(err)
	}
	p, err := r.spawner.startAgent(program, req, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.abandon)
	return p, p.arrived()
}

// What keeps a process from becoming the agent is said, and no part of its confinement is left out for it.
func TestAgentThatCannotBecomeOneSaysWhy(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	p, err := agentOf(t, r, spawnRequest{Base: 0x7fff0000, Doors: 1})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.goOn(t.Context(), nil); err != nil { // without the cgroup that it is to enter
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close() //nolint:errcheck // a test's
	_, err = p.introduce(t.Context(), []*os.File{null, null}, nil)
	if err == nil || !strings.Contains(err.Error(), "cannot enter a cgroup: bad file descriptor") {
		t.Errorf("a process without its cgroup: %v", err)
	}
}

// A daemon that dies before it lets a forked process go on leaves no process.
func TestAgentWithoutAWordToGoEnds(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	p, err := agentOf(t, r, spawnRequest{Base: 0x7fff0000})
	if err != nil {
		t.Fatal(err)
	}
	if err := p.boot.Close(); err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { waitProcess(p.pidfd); close(done) }()
	select {
	case <-done:
	case <-time.After(spawnTimeout):
		t.Error("it waits on")
	}
}
