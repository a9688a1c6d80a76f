package workload

import (
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
