package workload

import (
	"sync"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// refused: with the reason, and KindExhausted.
func refused(t *testing.T, err error, reason string) {
	t.Helper()
	if spec.KindOf(err) != spec.KindExhausted || spec.ReasonOf(err) != reason {
		t.Errorf("%v (%s), want refused for %s", err, spec.ReasonOf(err), reason)
	}
}

// Many starts at once are let through up to the bound, and one more once one has ended; a limit cannot be raised past it either.
func TestCommittedIsBounded(t *testing.T) {
	for reason, a := range map[string]Admission{
		ReasonAdmissionMemory: {MemoryBytes: 3 * DefaultResources.MemoryBytes},
		ReasonAdmissionPids:   {Pids: 3 * uint64(DefaultResources.Pids)},
	} {
		t.Run(reason, func(t *testing.T) {
			h := newHost(t)
			m := h.open()
			defer m.Close()
			m.cfg.Admission = a
			ids := make([]string, 8)
			for i := range ids {
				ids[i] = h.create(m, "exec sleep 1000")
			}
			started := make(chan string, len(ids))
			var starts sync.WaitGroup
			for _, id := range ids {
				starts.Go(func() {
					if _, err := m.Start(h.ctx(), id); err == nil {
						started <- id
					} else {
						refused(t, err, reason)
						if w, _ := m.Get(id); w.Status.State != StateCreated {
							t.Errorf("what was refused is %s", w.Status.State)
						}
					}
				})
			}
			starts.Wait()
			if len(started) != 3 {
				t.Fatalf("%d were started, want 3", len(started))
			}
			one := <-started
			if a.Pids > 0 { // the fake cannot have more memory while it runs
				_, err := m.Update(h.ctx(), one, spec.Caller{}, func(r *spec.Resources) { r.Pids = 2 * DefaultResources.Pids })
				refused(t, err, reason)
			}
			if err := m.Delete(h.ctx(), one, true); err != nil {
				t.Fatal(err)
			}
			begun := 0
			for _, id := range ids {
				if w, err := m.Get(id); err == nil && w.Status.State == StateCreated {
					if _, err := m.Start(h.ctx(), id); err == nil {
						begun++
					}
				}
			}
			if begun != 1 {
				t.Errorf("%d were started once one had ended, want 1", begun)
			}
			for _, id := range ids {
				_ = m.Delete(h.ctx(), id, true)
			}
		})
	}
}

func TestWorkloadsOfACallerAreBounded(t *testing.T) {
	h := newHost(t)
	m := h.open()
	m.cfg.Admission = Admission{WorkloadsPerCaller: 2}
	o := onceOptions("")
	for range 2 {
		if _, err := m.Create(h.ctx(), o); err != nil {
			t.Fatal(err)
		}
	}
	_, err := m.Create(h.ctx(), o)
	refused(t, err, ReasonAdmissionWorkloads)
	o.Caller.UID = 77
	if _, err := m.Create(h.ctx(), o); err != nil {
		t.Errorf("another caller: %v", err)
	}
	// Also after a restart.
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = h.open()
	defer m.Close()
	m.cfg.Admission = Admission{WorkloadsPerCaller: 2}
	o.Caller.UID = 0
	_, err = m.Create(h.ctx(), o)
	refused(t, err, ReasonAdmissionWorkloads)
	all, _, _ := m.List(Filter{}, 10, "")
	if err := m.Delete(h.ctx(), all[0].ID, false); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Create(h.ctx(), o); err != nil {
		t.Errorf("after a removal: %v", err)
	}
}

func TestDiskStaysFree(t *testing.T) {
	h := newHost(t)
	m := h.open()
	defer m.Close()
	id := h.create(m, "true")
	m.cfg.Admission = Admission{DiskFreeBytes: 1 << 62}
	_, err := m.Create(h.ctx(), onceOptions(""))
	refused(t, err, ReasonAdmissionDisk)
	_, err = m.Start(h.ctx(), id)
	refused(t, err, ReasonAdmissionDisk)
}
