package microvm

import (
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

func (b *bench) usePool(size int) {
	b.useTemplates()
	b.config.Templates.Pool.Size = size
}

// awaitWaiting waits until so many clones wait.
func awaitWaiting(t *testing.T, r *Runtime, key templateKey, want int) {
	t.Helper()
	ctx := testContext(t)
	for r.pool.waiting(key) != want {
		select {
		case <-ctx.Done():
			t.Fatalf("%d clones wait, not %d", r.pool.waiting(key), want)
		case <-time.After(10 * time.Millisecond):
		}
	}
}

func wantStarted(t *testing.T, v *vm, from string) {
	t.Helper()
	if f := v.Facts(); f.StartedFrom != from || f.StartNote != "" {
		t.Fatalf("started from %q (%s), not from %q", f.StartedFrom, f.StartNote, from)
	}
}

// TestAVMFromThePool: one that had waited is a VM like any other: its limits, its console, its layer over a stop, for the next
// daemon, too; and what waits is nobody's.
func TestAVMFromThePool(t *testing.T) {
	b := newBench(t)
	b.usePool(2)
	r := b.runtime(t)
	key := b.template(t, r, b.sandbox())
	awaitWaiting(t, r, key, 2)
	if ids, err := r.List(testContext(t)); err != nil || len(ids) > 0 {
		t.Errorf("what waits is listed: %v, %v", ids, err)
	}
	s := b.sandbox()
	s.ConsolePath = filepath.Join(t.TempDir(), "console.log")
	s.Resources.CPUMillis = 700
	v := b.startSandbox(t, r, s)
	wantStarted(t, v, startedPool)
	i := v.Instance.(*instance)
	if got, want := i.rec.MadeAs, s.ID; got == want || got == "" {
		t.Errorf("it was made as %q and is %q", got, want)
	}
	if u, err := v.Usage(); err != nil || u.MemoryLimitBytes != r.limits(s.Resources, i.rec.Accelerator, i.rec.SharedBytes).MemoryBytes || u.DiskBytes == 0 {
		t.Errorf("its usage: %+v, %v", u, err)
	}
	if got := v.sh(t, "echo kept >/f; /bin/busybox sync; cat /f"); got != "kept" {
		t.Errorf("it says %q", got)
	}
	checkClock(t, v)

	second := b.start(t, r)
	wantStarted(t, second, startedPool)
	if got := second.sh(t, "[ -e /f ] || echo nothing of another"); got != "nothing of another" {
		t.Errorf("the second says %q", got)
	}
	// The next daemon finds them; what waited has gone with the one before.
	v.client.Close()
	second.client.Close()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	r = b.runtime(t)
	ids, err := r.List(testContext(t))
	slices.Sort(ids)
	if want := sorted([]string{s.ID, second.ID}); err != nil || !slices.Equal(ids, want) {
		t.Errorf("the next daemon finds %v (%v), not %v", ids, err, want)
	}
	again, err := r.Attach(testContext(t), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	v = &vm{Sandbox: s, Instance: again, client: agent.New(again.Dial, again.Done())}
	if got := v.sh(t, "cat /f"); got != "kept" {
		t.Errorf("an attached one says %q", got)
	}
	v.client.Close()
	if err := r.Release(testContext(t), s.ID); err != nil {
		t.Fatal(err)
	}
	// With a layer of its own it can be none that waits.
	v = b.startSandbox(t, r, s)
	wantStarted(t, v, startedTemplate)
	if got := v.sh(t, "cat /f"); got != "kept" {
		t.Errorf("started again it says %q", got)
	}
	awaitWaiting(t, r, key, 2)
	if _, err := r.Start(testContext(t), s); spec.KindOf(err) != spec.KindAlreadyExists {
		t.Errorf("a second start = %v", err)
	}
	b.remove(t, r, s.ID)
	b.remove(t, r, second.ID)
}

// TestThePoolGivesUp: what waits goes with its template; one that died is not handed out; and there is no more of them than memory
// for them.
func TestThePoolGivesUp(t *testing.T) {
	b := newBench(t)
	b.usePool(2)
	b.config.Templates.Pool.MaxBytes = guestMemory
	r := b.runtime(t)
	key := b.template(t, r, b.sandbox())
	awaitWaiting(t, r, key, 1)
	r.makersIdle(t)
	if n := r.pool.waiting(key); n != 1 {
		t.Errorf("%d wait, where there is memory for one", n)
	}
	waiting := func() *instance {
		r.pool.mu.Lock()
		defer r.pool.mu.Unlock()
		for _, of := range r.pool.kinds {
			if len(of.waiting) > 0 {
				return of.waiting[0]
			}
		}
		return nil
	}
	first := waiting()
	if err := first.Kill(); err != nil {
		t.Fatal(err)
	}
	awaitDone(t, first)
	v := b.start(t, r)
	wantStarted(t, v, startedTemplate)
	awaitWaiting(t, r, key, 1)

	// One that does not go on: another is made, visibly.
	broken := waiting()
	if err := broken.group.Freeze(testContext(t)); err != nil {
		t.Fatal(err)
	}
	v = b.start(t, r)
	if f := v.Facts(); f.StartedFrom != startedTemplate || !strings.Contains(f.StartNote, "did not go on") {
		t.Errorf("started from %q (%s)", f.StartedFrom, f.StartNote)
	}
	if got := v.sh(t, "echo hello"); got != "hello" {
		t.Errorf("it says %q", got)
	}
	awaitWaiting(t, r, key, 1)
	last := waiting()
	if err := r.RemoveTemplate(testContext(t), string(key)); err != nil {
		t.Fatal(err)
	}
	if n := r.pool.waiting(key); n != 0 {
		t.Errorf("%d wait, of a template that is gone", n)
	}
	awaitDone(t, last)
	v = b.start(t, r)
	wantStarted(t, v, startedCold)
}

// makersIdle waits until nobody fills the pool.
func (r *Runtime) makersIdle(t *testing.T) {
	t.Helper()
	ctx := testContext(t)
	for {
		r.pool.mu.Lock()
		filling := r.pool.filling
		r.pool.mu.Unlock()
		if !filling {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatal("somebody fills the pool for ever")
		case <-time.After(10 * time.Millisecond):
		}
	}
}
