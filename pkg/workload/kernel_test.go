package workload

import (
	"testing"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// counted is an instance whose cgroup counts a kill.
type counted struct{ runtime.Instance }

func (counted) Usage() (spec.Usage, error) {
	return spec.Usage{OOMKills: 2, MemoryLimitBytes: 3, MemoryPeakBytes: 4}, nil
}

// ownKernel is one that has a kernel of its own, too.
type ownKernel struct{ counted }

func (ownKernel) HasOwnKernel() {}

// Where the host's kernel killed depends on whose processes are in the cgroup: the workload's, or its monitor's.
func TestWhereMemoryRanOut(t *testing.T) {
	for where, inst := range map[OOMWhere]runtime.Instance{OOMContainer: counted{}, OOMVMM: ownKernel{}} {
		got := (&entry{}).oom(&run{inst: inst})
		if want := (OOM{Where: where, Kills: 2, LimitBytes: 3, PeakBytes: 4}); got == nil || *got != want {
			t.Errorf("%T: %+v, want %+v", inst, got, want)
		}
	}
}

// An agent without a kernel of its own sees the host's memory: its claims are not shown, and it has no console.
func TestWithoutAKernelOfItsOwn(t *testing.T) {
	h := newHost(t)
	m := h.open()
	defer m.Close()
	id := h.start(m, "read x")
	u, err := m.Usage(h.ctx(), id)
	if err != nil {
		t.Fatal(err)
	}
	if u.Claims.MemoryTotalBytes != 0 || u.Claims.MemoryAvailableBytes != 0 {
		t.Errorf("claims are %+v", u.Claims)
	}
	err = m.Logs(h.ctx(), id, LogOptions{Console: true, Tail: -1}, func(LogEntry) error { return nil })
	if spec.KindOf(err) != spec.KindUnsupported {
		t.Errorf("logs of a console: %v", err)
	}
}
