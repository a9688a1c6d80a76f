package workload

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Admission bounds what workloads may hold of the host together; a zero is no bound. Who would go beyond is refused with
// KindExhausted, the reason of the bound, and what to do.
type Admission struct {
	// Sums over the workloads that have a sandbox, or are getting one, of what they may use.
	MemoryBytes uint64
	Pids        uint64
	// What must be left of the disk behind the state directory, for a creation or a start.
	DiskFreeBytes uint64
	// Of each caller, in whatever state.
	WorkloadsPerCaller int
}

// Reasons of refusals.
const (
	ReasonAdmissionMemory    = "ADMISSION_MEMORY"
	ReasonAdmissionPids      = "ADMISSION_PIDS"
	ReasonAdmissionDisk      = "ADMISSION_DISK"
	ReasonAdmissionWorkloads = "ADMISSION_WORKLOADS"
)

// holds reports whether a workload of this state has a sandbox.
func holds(s State) bool {
	switch s {
	case StateStarting, StateRunning, StatePaused, StateStopping:
		return true
	}
	return false
}

// commit calls then, which makes e a holder of resources, if they are there. Nobody else commits meanwhile.
func (m *Manager) commit(e *entry, r spec.Resources, then func() error) error {
	a := m.cfg.Admission
	if a.MemoryBytes == 0 && a.Pids == 0 && a.DiskFreeBytes == 0 {
		return then()
	}
	if err := m.roomOnDisk(); err != nil {
		return err
	}
	m.admitting.Lock()
	defer m.admitting.Unlock()
	memory, pids := m.committed(e)
	if err := within(a.MemoryBytes, memory, r.MemoryBytes, ReasonAdmissionMemory, "bytes of memory"); err != nil {
		return err
	}
	if err := within(a.Pids, pids, uint64(r.Pids), ReasonAdmissionPids, "processes"); err != nil {
		return err
	}
	return then()
}

// committed is what all but one may use.
func (m *Manager) committed(but *entry) (memory, pids uint64) {
	for _, e := range m.entries() {
		if e == but {
			continue
		}
		e.mu.Lock()
		if r := e.rec.Spec.Resources; holds(e.rec.Status.State) {
			memory += r.MemoryBytes
			pids += uint64(r.Pids)
		}
		e.mu.Unlock()
	}
	return memory, pids
}

func within(bound, held, asked uint64, reason, of string) error {
	if bound == 0 || asked <= bound && held <= bound-asked {
		return nil
	}
	return spec.Errorf(spec.KindExhausted, "this host commits at most %d %s, of which %d are taken, and %d are asked for: stop a workload, or ask for less", bound, of, held, asked).WithReason(reason)
}

func (m *Manager) roomOnDisk() error {
	least := m.cfg.Admission.DiskFreeBytes
	if least == 0 {
		return nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(m.dir, &st); err != nil {
		return fmt.Errorf("cannot look at the disk: %w", err)
	}
	if free := st.Bavail * uint64(st.Bsize); free < least {
		return spec.Errorf(spec.KindExhausted, "the disk has %d MiB left, and %d must stay free: remove workloads or images that are not needed", free>>20, least>>20).WithReason(ReasonAdmissionDisk)
	}
	return nil
}

// admitCallerLocked refuses a caller who has enough workloads.
func (m *Manager) admitCallerLocked(caller spec.Caller) error {
	most := m.cfg.Admission.WorkloadsPerCaller
	if most == 0 {
		return nil
	}
	if n := m.ofCaller[caller.Key()]; n >= most {
		return spec.Errorf(spec.KindExhausted, "this caller has %d workloads, and may have %d: remove some that are not needed", n, most).WithReason(ReasonAdmissionWorkloads)
	}
	return nil
}

// Counted is a group of workloads.
type Counted struct {
	Isolation spec.Isolation
	State     State
	// The label of that name; empty without.
	Tenant string
}

// Count says how many there are of each group.
func (m *Manager) Count() map[Counted]int {
	out := map[Counted]int{}
	for _, e := range m.entries() {
		e.mu.Lock()
		out[Counted{e.rec.Status.Isolation, e.rec.Status.State, e.rec.Labels[spec.TenantLabel]}]++
		e.mu.Unlock()
	}
	return out
}

// Committed is what all workloads that have a sandbox may use together.
func (m *Manager) Committed() (memory, pids uint64) { return m.committed(nil) }

// IsolationOf is empty if there is no workload of this id.
func (m *Manager) IsolationOf(id string) spec.Isolation {
	m.mu.Lock()
	e := m.byID[id]
	m.mu.Unlock()
	if e == nil {
		return ""
	}
	return e.isolation()
}
