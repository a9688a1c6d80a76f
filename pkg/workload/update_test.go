package workload

import (
	"context"
	"errors"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

func (h *host) update(m *Manager, id string, change func(*spec.Resources)) (Workload, error) {
	h.t.Helper()
	return m.Update(h.ctx(), id, spec.Caller{}, change)
}

func (h *host) pidsLimit(m *Manager, id string) uint64 {
	h.t.Helper()
	u, err := m.Usage(h.ctx(), id)
	if err != nil {
		h.t.Fatal(err)
	}
	return u.Host.PidsLimit
}

func TestUpdate(t *testing.T) {
	h := newHost(t)
	m := h.open()
	id := h.start(m, "read x")
	w, err := h.update(m, id, func(r *spec.Resources) { r.Pids = 77 })
	if err != nil || w.Spec.Resources.Pids != 77 || h.pidsLimit(m, id) != 77 {
		t.Fatalf("updated to %+v, real %d, %v", w.Spec.Resources, h.pidsLimit(m, id), err)
	}
	if w.Spec.Resources.MemoryBytes != DefaultResources.MemoryBytes {
		t.Errorf("what was not named changed: %+v", w.Spec.Resources)
	}
	// What cannot be changes nothing.
	_, err = h.update(m, id, func(r *spec.Resources) { r.Pids, r.MemoryBytes = 88, 1<<30 })
	if spec.KindOf(err) != spec.KindWrongState || h.pidsLimit(m, id) != 77 {
		t.Errorf("refused with %v, real %d", err, h.pidsLimit(m, id))
	}
	if _, err = h.update(m, id, func(r *spec.Resources) { r.MemoryHighBytes = 1 << 40 }); spec.KindOf(err) != spec.KindInvalid {
		t.Errorf("more memory_high than memory: %v", err)
	}
	// Paused or found again by another daemon, it has them.
	if _, err := m.Pause(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	if _, err = h.update(m, id, func(r *spec.Resources) { r.Pids = 66 }); err != nil || h.pidsLimit(m, id) != 66 {
		t.Errorf("paused: %v, real %d", err, h.pidsLimit(m, id))
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = h.boot()
	if w, err := m.Get(id); err != nil || w.Spec.Resources.Pids != 66 || h.pidsLimit(m, id) != 66 {
		t.Errorf("found again with %+v, %v, real %d", w.Spec.Resources, err, h.pidsLimit(m, id))
	}
	// Of one that does not run they are for its next start; zero goes back to the default.
	if _, err := m.Stop(h.ctx(), id, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := h.update(m, id, func(r *spec.Resources) { r.MemoryBytes, r.Pids = 1<<30, 0 }); err != nil {
		t.Fatal(err)
	}
	if _, err := h.update(m, id, func(r *spec.Resources) { r.DiskBytes = 1 << 30 }); spec.KindOf(err) != spec.KindWrongState {
		t.Errorf("another size for a layer that is there: %v", err)
	}
	if _, err := m.Start(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	u, err := m.Usage(h.ctx(), id)
	if err != nil || u.Host.MemoryLimitBytes != 1<<30 || u.Host.PidsLimit != uint64(DefaultResources.Pids) {
		t.Errorf("started with %+v, %v", u.Host, err)
	}
}

// An update is decided by the policy as a creation would be: not one limit more is to be had by asking later.
func TestUpdateIsNoWayRoundThePolicy(t *testing.T) {
	h := newHost(t)
	var err error
	h.policy, err = policy.Load([]byte(`version: 1
default: container
rules:
  - name: greedy
    when: request.resources.memoryBytes > 1073741824
    deny: true
  - name: big
    when: request.resources.pids > 1000
    isolation: vm
  - name: not-you
    when: caller.uid == 1234 && request.resources.cpuMillis > 1000
    deny: true
`), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	m := h.boot()
	w, err := m.Create(h.ctx(), CreateOptions{Spec: spec.Workload{
		Image: "busybox", Isolation: spec.IsolationContainer, Process: spec.Process{Command: []string{"/bin/sh", "-c", "read x"}, Stdin: true},
	}})
	if err != nil {
		t.Fatal(err)
	}
	for _, started := range []bool{false, true} {
		if started {
			if _, err := m.Start(h.ctx(), w.ID); err != nil {
				t.Fatal(err)
			}
		}
		for rule, attempt := range map[string]struct {
			uid    uint32
			change func(*spec.Resources)
		}{
			"greedy":  {0, func(r *spec.Resources) { r.MemoryBytes = 2 << 30 }},
			"big":     {0, func(r *spec.Resources) { r.Pids = 2000 }},
			"not-you": {1234, func(r *spec.Resources) { r.CPUMillis = 2000 }},
		} {
			_, err := m.Update(h.ctx(), w.ID, spec.Caller{UID: attempt.uid}, attempt.change)
			var refusal *spec.Error
			if !errors.As(err, &refusal) || refusal.Kind != spec.KindDenied || refusal.Rule != rule {
				t.Errorf("started %v, rule %s: %v", started, rule, err)
			}
		}
		if now, err := m.Get(w.ID); err != nil || now.Spec.Resources != w.Spec.Resources {
			t.Errorf("after refusals: %+v, %v", now.Spec.Resources, err)
		}
		if now, err := h.update(m, w.ID, func(r *spec.Resources) { r.CPUMillis = 1500 }); err != nil || now.Status.Decision.Rule != policy.RuleDefault {
			t.Errorf("allowed: %+v, %v", now.Status.Decision, err)
		}
		if _, err := h.update(m, w.ID, func(r *spec.Resources) { r.CPUMillis = 0 }); err != nil {
			t.Error(err)
		}
	}
}

// stubborn refuses one update half-way.
type stubborn struct {
	runtime.Instance
	refuse uint32
	now    spec.Resources
}

func (s *stubborn) CheckUpdate(_, _ spec.Resources) error { return nil }

func (s *stubborn) Update(_ context.Context, to spec.Resources) error {
	s.now.CPUMillis = to.CPUMillis
	if to.Pids == s.refuse {
		return errors.New("no more")
	}
	s.now.Pids = to.Pids
	return nil
}

// An update that fails half-way leaves neither the record nor the sandbox with half of it.
func TestFailedUpdateIsUndone(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.start(m, "read x")
	e, err := m.find(id)
	if err != nil {
		t.Fatal(err)
	}
	_, r, _ := e.peek()
	s := &stubborn{Instance: r.inst, refuse: 13}
	r.inst = s
	if _, err := h.update(m, id, func(r *spec.Resources) { r.Pids, r.CPUMillis = 13, 2000 }); err == nil {
		t.Fatal("it worked")
	}
	w, err := m.Get(id)
	if err != nil || w.Spec.Resources.Pids != DefaultResources.Pids || w.Spec.Resources.CPUMillis != DefaultResources.CPUMillis {
		t.Errorf("recorded %+v, %v", w.Spec.Resources, err)
	}
	if s.now.Pids != DefaultResources.Pids || s.now.CPUMillis != DefaultResources.CPUMillis {
		t.Errorf("real %+v", s.now)
	}
}
