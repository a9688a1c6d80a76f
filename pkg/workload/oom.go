package workload

import (
	"context"
	"fmt"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/runtime"
)

// OOMWhere is where memory ran out.
type OOMWhere string

const (
	// The container's limit: a fact, from the cgroup.
	OOMContainer OOMWhere = "container"
	// The guest's memory: a claim of the agent's.
	OOMGuest OOMWhere = "guest"
	// The limit of the VM's cgroup, guest and QEMU together: a fact.
	OOMVMM OOMWhere = "vmm"
)

// OOM is a lack of memory in a workload's last run.
type OOM struct {
	Where OOMWhere `json:"where"`
	// Processes killed.
	Kills uint64 `json:"kills"`
	// Of the sandbox's cgroup.
	LimitBytes uint64 `json:"limitBytes"`
	PeakBytes  uint64 `json:"peakBytes"`
}

// oom asks, before the walls go, whether memory ran out; nil if not, or if nobody knows. The agent is asked only while its
// sandbox stands, and after the cgroup: what the host knows comes first.
func (e *entry) oom(r *run) *OOM {
	u, err := r.inst.Usage()
	if err != nil {
		e.m.cfg.Log.Warn("cannot see whether memory ran out", zap.String("workload", e.id), zap.Error(err))
		return nil
	}
	o := &OOM{Where: OOMContainer, Kills: u.OOMKills, LimitBytes: u.MemoryLimitBytes, PeakBytes: u.MemoryPeakBytes}
	_, ownKernel := r.inst.(runtime.OwnKernel)
	switch {
	case u.OOMKills > 0 && ownKernel:
		o.Where = OOMVMM
	case u.OOMKills > 0:
	case ownKernel:
		if o.Where, o.Kills = OOMGuest, e.guestKills(r); o.Kills == 0 {
			return nil
		}
	default:
		return nil
	}
	return o
}

// guestKills is what a guest says of its kernel's kills.
func (e *entry) guestKills(r *run) uint64 {
	select {
	case <-r.inst.Done():
		return 0
	default:
	}
	ctx, cancel := context.WithTimeout(e.m.ctx, claimsLimit)
	defer cancel()
	claims, err := r.client.Stats(ctx)
	if err != nil {
		e.m.cfg.Log.Debug("agent does not answer", zap.String("workload", e.id), zap.Error(err))
	}
	return claims.OOMKills
}

func (o *OOM) String() string {
	const mib = 1 << 20
	switch o.Where {
	case OOMGuest:
		return fmt.Sprintf("out of memory: its guest says that its kernel killed %d of its processes", o.Kills)
	case OOMVMM:
		return fmt.Sprintf("out of memory: VM and VMM together reached %d MiB of %d, and the host's kernel killed %d of their processes", o.PeakBytes/mib, o.LimitBytes/mib, o.Kills)
	default:
		return fmt.Sprintf("out of memory: it reached %d MiB of %d, and the kernel killed %d of its processes", o.PeakBytes/mib, o.LimitBytes/mib, o.Kills)
	}
}
