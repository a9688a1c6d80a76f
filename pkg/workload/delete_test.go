package workload

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// wantGone waits until a workload is removed, and nothing of it is left.
func wantGone(t *testing.T, h *host, m *Manager, id string) {
	t.Helper()
	for limit := time.Now().Add(waitLimit); ; <-time.After(5 * time.Millisecond) {
		w, err := m.Get(id)
		if spec.KindOf(err) == spec.KindNotFound {
			break
		}
		if err != nil || time.Now().After(limit) {
			t.Fatalf("it is still %s: %v", w.Status.State, err)
		}
	}
	if left := h.sandboxes(); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
	if left, err := filepath.Glob(filepath.Join(h.dir, "state/*", id)); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// Nobody has to ask again for a removal that failed on its way, and who does is no worse off.
func TestFailedRemovalIsTriedAgain(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.create(m, "true")
	h.rt.failRemoves(2) // the caller's, and one more
	if err := m.Delete(h.ctx(), id, false); err == nil {
		t.Fatal("a removal that failed says nothing")
	}
	if w, err := m.Get(id); err != nil || w.Status.State != StateDeleting {
		t.Fatalf("%s, %v", w.Status.State, err)
	}
	wantGone(t, h, m, id)

	id = h.create(m, "true")
	h.rt.failRemoves(1)
	if err := m.Delete(h.ctx(), id, false); err == nil {
		t.Fatal("a removal that failed says nothing")
	}
	if err := m.Delete(h.ctx(), id, false); err != nil && spec.KindOf(err) != spec.KindNotFound {
		t.Errorf("asked again: %v", err)
	}
	wantGone(t, h, m, id)
}

// The same after a restart whose own attempt fails too.
func TestRecoveredRemovalIsTriedAgain(t *testing.T) {
	h := newHost(t)
	m := h.open()
	id := h.create(m, "true")
	h.rt.failRemoves(2)
	if err := m.Delete(h.ctx(), id, false); err == nil {
		t.Fatal("a removal that failed says nothing")
	}
	if err := m.Close(); err != nil { // ends the first daemon's attempts
		t.Fatal(err)
	}
	wantGone(t, h, h.boot(), id)
}

// A daemon that dies once a removal by force was asked for, before, while and after it kills, leaves it to the next one.
func TestForcedRemovalIsFinishedByTheNextDaemon(t *testing.T) {
	for _, state := range []State{StateStarting, StateRunning, StateStopping, StateFailed} {
		for _, killed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s killed %v", state, killed), func(t *testing.T) {
				h := newHost(t)
				m := h.open()
				id := h.start(m, "exec sleep 1000")
				e, err := m.find(id)
				if err != nil {
					t.Fatal(err)
				}
				_, r, _ := e.peek()
				if err := m.Close(); err != nil { // as if it died: nothing is touched
					t.Fatal(err)
				}
				if killed {
					if err := r.inst.Kill(); err != nil {
						t.Fatal(err)
					}
					<-r.inst.Done()
				}
				st, err := openStore(m.dir)
				if err != nil {
					t.Fatal(err)
				}
				rec := e.rec
				rec.Condemned, rec.Status.State = true, state
				if _, err := st.put(&rec); err != nil {
					t.Fatal(err)
				}
				if err := st.close(); err != nil {
					t.Fatal(err)
				}
				h.rt.failRemoves(1) // the attempt of its recovery: it is tried again
				wantGone(t, h, h.boot(), id)
			})
		}
	}
}

// Its record says what is to become of it before anything is killed, and goes on without its caller.
func TestForcedRemovalIsRecordedFirst(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.start(m, "exec sleep 1000")
	e, err := m.find(id)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.lock(h.ctx()); err != nil { // so that it is killed, and not removed yet
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(h.ctx())
	told := make(chan error, 1)
	go func() { told <- m.Delete(ctx, id, true) }()
	if w := h.wait(m, id); w.Status.State != StateFailed {
		t.Errorf("killed, it is %s", w.Status.State)
	}
	rec, _, _ := e.peek()
	if stored := storedRecord(t, m, id); !rec.Condemned || !stored.Condemned {
		t.Errorf("it was killed, and its record does not say why: %v, on the disk %v", rec.Condemned, stored.Condemned)
	}
	cancel()
	if err := <-told; !errors.Is(err, context.Canceled) {
		t.Errorf("its caller was told %v", err)
	}
	if _, err := m.Get(id); err != nil {
		t.Fatal(err)
	}
	if err := e.start(h.ctx()); spec.KindOf(err) != spec.KindWrongState {
		t.Errorf("started, though it is to be removed: %v", err)
	}
	e.unlock()
	wantGone(t, h, m, id)
}

func storedRecord(t *testing.T, m *Manager, id string) *record {
	t.Helper()
	all, err := m.store.all()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range all {
		if r.ID == id {
			return r
		}
	}
	t.Fatalf("no record of %s", id)
	return nil
}
