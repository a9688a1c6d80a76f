package workload

import (
	"errors"
	"sync"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func onceOptions(key string) CreateOptions {
	return CreateOptions{Key: key, Labels: map[string]string{"a": "1", "b": "2"}, Spec: spec.Workload{
		Image: "busybox", Isolation: spec.IsolationContainer, Process: spec.Process{Command: []string{"true"}},
	}}
}

// A retry makes no twin: not beside the first try, not afterwards, not after a restart, not once the workload has run.
func TestRetryMakesNoTwin(t *testing.T) {
	h := newHost(t)
	m := h.open()
	ids := make([]string, 20)
	var tries sync.WaitGroup
	for i := range ids {
		tries.Go(func() {
			w, err := m.Create(h.ctx(), onceOptions("k"))
			if err != nil {
				t.Error(err)
			}
			ids[i] = w.ID
		})
	}
	tries.Wait()
	again := func() Workload {
		t.Helper()
		w, err := m.Create(h.ctx(), onceOptions("k"))
		if err != nil || w.ID != ids[0] {
			t.Fatalf("a retry made %s, want %s: %v", w.ID, ids[0], err)
		}
		return w
	}
	for _, id := range ids {
		if id != ids[0] {
			t.Fatalf("tries at once made %s and %s", ids[0], id)
		}
	}
	again()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = h.open()
	again()
	if _, err := m.Start(h.ctx(), ids[0]); err != nil {
		t.Fatal(err)
	}
	h.wait(m, ids[0])
	if w := again(); w.Status.State != StateExited {
		t.Errorf("a retry is told %s, want how it is now", w.Status.State)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = h.open()
	defer m.Close()
	again()
	if all, _, _ := m.List(Filter{}, 100, ""); len(all) != 1 {
		t.Errorf("%d workloads, want 1", len(all))
	}

	// Another request, another caller, no key.
	other := onceOptions("k")
	other.Labels["a"] = "3"
	var e *spec.Error
	if _, err := m.Create(h.ctx(), other); !errors.As(err, &e) || e.Kind != spec.KindInvalid || e.Field != "idempotency_key" {
		t.Errorf("the same key with another request: %v", err)
	}
	stranger := onceOptions("k")
	stranger.Caller.UID = 77
	w, err := m.Create(h.ctx(), stranger)
	if err != nil || w.ID == ids[0] {
		t.Errorf("another caller with the same key got %s: %v", w.ID, err)
	}
	if w, err := m.Create(h.ctx(), onceOptions("")); err != nil || w.ID == ids[0] {
		t.Errorf("without a key: %s, %v", w.ID, err)
	}

	// Kept as long as the workload.
	if err := m.Delete(h.ctx(), ids[0], true); err != nil {
		t.Fatal(err)
	}
	if w, err := m.Create(h.ctx(), onceOptions("k")); err != nil || w.ID == ids[0] {
		t.Errorf("after the deletion: %s, %v", w.ID, err)
	}
	if len(m.byKey) != 2 || len(m.creating) != 0 {
		t.Errorf("%d keys are kept and %d taken, want 2 and 0", len(m.byKey), len(m.creating))
	}
}

// A try that failed leaves its key free.
func TestFailedTryKeepsNoKey(t *testing.T) {
	h := newHost(t)
	m := h.open()
	defer m.Close()
	bad := onceOptions("k")
	bad.Spec.Image = "no-such-image"
	if _, err := m.Create(h.ctx(), bad); err == nil {
		t.Fatal("a workload without an image was made")
	}
	if _, err := m.Create(h.ctx(), onceOptions("k")); err != nil {
		t.Errorf("after a failed try: %v", err)
	}
}
