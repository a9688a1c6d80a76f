package container

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/idrange"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// fillLimit bounds the wait for a pool to be full.
const fillLimit = time.Minute

// warmed is a daemon whose pool is full.
func (h *host) warmed(t *testing.T, size int) *Runtime {
	t.Helper()
	h.config.Pool = Pool{Size: size, DiskBytes: h.sandbox(1).Resources.DiskBytes}
	r := h.daemon(t)
	r.Warm()
	awaitFull(t, r)
	return r
}

func awaitFull(t *testing.T, r *Runtime) {
	t.Helper()
	for begin := time.Now(); waiting(r) < r.pool.c.Size; time.Sleep(time.Millisecond) {
		if time.Since(begin) > fillLimit {
			t.Fatalf("%d of %d agents wait after %v", waiting(r), r.pool.c.Size, fillLimit)
		}
	}
}

func waiting(r *Runtime) int {
	r.pool.mu.Lock()
	defer r.pool.mu.Unlock()
	return len(r.pool.waiting)
}

// A sandbox from the pool is like any other: its limits, its layer over a stop, its removal; and what waits is nobody's.
func TestSandboxFromThePool(t *testing.T) {
	h := newHost(t)
	r := h.warmed(t, 2)
	if ids, err := r.List(t.Context()); err != nil || len(ids) > 0 {
		t.Errorf("what waits is listed: %v, %v", ids, err)
	}
	s := h.sandbox(1)
	before := waiting(r)
	i := mustStart(t, r, s)
	if waiting(r) >= before {
		t.Fatal("it is not from the pool: this test tests nothing")
	}
	want(t, i, "echo kept >/f; cat /f", "kept")
	if u, err := i.Usage(); err != nil || u.MemoryLimitBytes != s.Resources.MemoryBytes || u.PidsLimit != uint64(s.Resources.Pids) {
		t.Errorf("its limits: %+v, %v", u, err)
	}
	if ids, err := r.List(t.Context()); err != nil || !slices.Equal(ids, []string{s.ID}) {
		t.Errorf("List = %v, %v", ids, err)
	}
	if _, err := r.Start(t.Context(), s); spec.KindOf(err) != spec.KindAlreadyExists {
		t.Errorf("a second start = %v", err)
	}
	want(t, i, "cat /f", "kept") // the second start has taken nothing of it away

	other := h.sandbox(2)
	awaitFull(t, r)
	j := mustStart(t, r, other)
	want(t, j, "[ -e /f ] || echo nothing of another", "nothing of another")
	if a, b := i.(*instance).rec.IDBase, j.(*instance).rec.IDBase; a == b {
		t.Errorf("both have the ids from %d on", a)
	}
	if err := r.Release(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	awaitFull(t, r)
	want(t, mustStart(t, r, s), "cat /f", "kept") // not with an empty layer from the pool
	mustRemove(t, r, s.ID)
	mustRemove(t, r, other.ID)
}

// awaitPrepared waits until n of those that wait have a root.
func awaitPrepared(t *testing.T, r *Runtime, n int) {
	t.Helper()
	for begin := time.Now(); ; time.Sleep(time.Millisecond) {
		prepared := 0
		r.pool.mu.Lock()
		for _, st := range r.pool.waiting {
			if st.prepared != nil {
				prepared++
			}
		}
		r.pool.mu.Unlock()
		if prepared == n && waiting(r) == r.pool.c.Size {
			return
		}
		if time.Since(begin) > fillLimit {
			t.Fatalf("%d of those that wait have a root after %v, not %d", prepared, fillLimit, n)
		}
	}
}

// Once it is known what is started, most of those that wait have a root for it; who wants another has one without, and nobody gets
// another's.
func TestRootsAreMadeAheadOfTime(t *testing.T) {
	h := newHost(t)
	r := h.warmed(t, 3)
	const prepared = "[ -e /prepared ] && cat /prepared || echo none"
	s := h.sandbox(1)
	s.Prepare = []byte(`{"kind":1}`)
	want(t, mustStart(t, r, s), prepared, "none")
	mustRemove(t, r, s.ID)
	awaitPrepared(t, r, 2)
	i := mustStart(t, r, s)
	want(t, i, prepared, string(s.Prepare))
	want(t, i, "cat /etc/motd", "from the image")
	if u, err := i.Usage(); err != nil || u.MemoryLimitBytes != s.Resources.MemoryBytes {
		t.Errorf("its limits: %+v, %v", u, err)
	}
	if err := r.Release(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	awaitPrepared(t, r, 2)
	want(t, mustStart(t, r, s), prepared, string(s.Prepare)) // its own layer, not one that was prepared
	mustRemove(t, r, s.ID)

	awaitPrepared(t, r, 2)
	other := h.sandbox(2)
	other.Prepare = []byte(`{"kind":2}`)
	want(t, mustStart(t, r, other), prepared, "none")
	plain := h.sandbox(3)
	want(t, mustStart(t, r, plain), prepared, "none")
	mustRemove(t, r, other.ID)
	mustRemove(t, r, plain.ID)

	r.pool.unprepare()
	awaitPrepared(t, r, 0)
	if err := r.mounts.do(func() error {
		for _, img := range r.mounts.images {
			if img.users != 0 {
				t.Errorf("%d use the image", img.users)
			}
		}
		return nil
	}); err != nil {
		t.Error(err)
	}
}

// What cannot be made ahead of time is tried once.
func TestRootThatCannotBeMadeAheadOfTime(t *testing.T) {
	h := newHost(t)
	r := h.warmed(t, 2)
	s := h.sandbox(1)
	s.Prepare = []byte(unpreparable)
	for range 2 {
		mustStart(t, r, s)
		mustRemove(t, r, s.ID)
		for begin := time.Now(); ; time.Sleep(time.Millisecond) {
			r.pool.mu.Lock()
			tried := r.pool.unfit != nil && r.pool.wanted == nil
			r.pool.mu.Unlock()
			if tried {
				break
			}
			if time.Since(begin) > fillLimit {
				t.Fatal("nobody tried")
			}
		}
	}
}

// An agent whose root was prepared and that has ended is found out like any other.
func TestPoolDropsPreparedThatHasEnded(t *testing.T) {
	h := newHost(t)
	r := h.warmed(t, 1)
	s := h.sandbox(1)
	s.Prepare = []byte(`{"kind":1}`)
	mustStart(t, r, s)
	mustRemove(t, r, s.ID)
	awaitPrepared(t, r, 1)
	r.pool.mu.Lock()
	if err := signalProcess(r.pool.waiting[0].agent.pidfd, unix.SIGKILL); err != nil {
		t.Error(err)
	}
	waitProcess(r.pool.waiting[0].agent.pidfd)
	r.pool.mu.Unlock()
	want(t, mustStart(t, r, s), "echo fine", "fine")
	mustRemove(t, r, s.ID)
}

func TestOtherDiskSizesAreNotFromThePool(t *testing.T) {
	h := newHost(t)
	r := h.warmed(t, 1)
	s := h.sandbox(1)
	s.Resources.DiskBytes *= 2
	i := mustStart(t, r, s)
	if waiting(r) != 1 {
		t.Error("the one that waits was taken")
	}
	if u, err := i.Usage(); err != nil || u.DiskLimitBytes != s.Resources.DiskBytes {
		t.Errorf("its limits: %+v, %v", u, err)
	}
	mustRemove(t, r, s.ID)
}

// An agent that ended while it waited is found out, removed, and replaced.
func TestPoolDropsWhatHasEnded(t *testing.T) {
	h := newHost(t)
	r := h.warmed(t, 2)
	r.pool.mu.Lock()
	if err := signalProcess(r.pool.waiting[0].agent.pidfd, unix.SIGKILL); err != nil {
		t.Error(err)
	}
	waitProcess(r.pool.waiting[0].agent.pidfd)
	r.pool.mu.Unlock()
	s := h.sandbox(1)
	want(t, mustStart(t, r, s), "echo fine", "fine")
	mustRemove(t, r, s.ID)
	awaitFull(t, r)
}

// The next daemon knows nothing of a pool, and finds what is left of it as it finds everything without a workload.
func TestDaemonDiesWithAPool(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil { // as in TestDaemonDiesInTheMiddleOfAStart
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) //nolint:errcheck // a test's
	for when, left := range map[string]int{
		poolCrashWaiting: 2, // agents
		poolCrashHalf:    2, // a sandbox, and its layer under its former id
		poolCrashNamed:   1,
	} {
		t.Run(when, func(t *testing.T) {
			h := newHost(t)
			c := crash{Dir: filepath.Dir(h.config.RunDir), Parent: h.config.CgroupParent, Sandbox: h.sandbox(1), Pool: when}
			at, err := json.Marshal(c)
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
			cmd.Env = append(os.Environ(), crashEnv+"="+string(at))
			out, err := cmd.CombinedOutput()
			if err == nil || !strings.Contains(err.Error(), "killed") {
				t.Fatalf("the daemon ended with %v: %s", err, out)
			}
			r := h.daemon(t)
			ids, err := r.List(t.Context())
			if err != nil || len(ids) != left {
				t.Errorf("the next daemon finds %v, %v; want %d", ids, err, left)
			}
			for _, id := range ids {
				mustRemove(t, r, id)
			}
			reap(t)
		})
	}
}

const (
	poolCrashWaiting = "while agents wait"
	poolCrashHalf    = "between the renames of one that is handed out"
	poolCrashNamed   = "when one that is handed out has its id"
)

// crashWithPool is the daemon's half of TestDaemonDiesWithAPool. It returns only if it fails.
func crashWithPool(h *host, c crash) error {
	h.config.Pool = Pool{Size: 2, DiskBytes: c.Sandbox.Resources.DiskBytes}
	if c.Pool != poolCrashWaiting {
		h.config.Pool.Size = 1
	}
	ids, err := idrange.Open(c.Dir + "/ids")
	if err != nil {
		return err
	}
	h.config.IDs = ids
	r, err := New(h.config)
	if err != nil {
		return err
	}
	r.Warm()
	for begin := time.Now(); waiting(r) < h.config.Pool.Size; time.Sleep(time.Millisecond) {
		if time.Since(begin) > fillLimit {
			return fmt.Errorf("%d agents wait", waiting(r))
		}
	}
	if c.Pool == poolCrashHalf {
		st := r.pool.waiting[0]
		if err := renameNew(r.dir(st.madeAs), r.dir(c.Sandbox.ID)); err != nil {
			return err
		}
	}
	if c.Pool == poolCrashNamed {
		if err := r.pool.waiting[0].become(c.Sandbox, nil); err != nil {
			return err
		}
	}
	return unix.Kill(os.Getpid(), unix.SIGKILL)
}
