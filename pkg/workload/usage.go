package workload

import (
	"context"
	"time"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Usage is what the host counts and what the agent claims.
type Usage struct {
	Workload Workload
	Host     spec.Usage
	Claims   spec.Claims
}

// claimsLimit bounds the wait for what the agent says: without it the host's numbers stand alone.
const claimsLimit = 2 * time.Second

func (m *Manager) Usage(ctx context.Context, ref string) (Usage, error) {
	e, err := m.find(ref)
	if err != nil {
		return Usage{}, err
	}
	rec, r, _ := e.peek()
	if rec.Status.State != StatePaused || r == nil {
		if r, err = e.running(); err != nil {
			return Usage{}, err
		}
	}
	host, err := r.inst.Usage()
	if err != nil {
		return Usage{}, err
	}
	u := Usage{Workload: e.workload(), Host: host}
	if rec.Status.State == StatePaused {
		return u, nil // its agent stands still, too
	}
	limited, cancel := context.WithTimeout(ctx, claimsLimit)
	defer cancel()
	if u.Claims, err = r.client.Stats(limited); err != nil {
		m.cfg.Log.Debug("agent does not answer", zap.String("workload", e.id), zap.Error(err))
	}
	if _, own := r.inst.(runtime.OwnKernel); !own {
		// What an agent without a kernel of its own says of memory is about the host.
		u.Claims.MemoryTotalBytes, u.Claims.MemoryAvailableBytes, u.Claims.MemoryCacheBytes = 0, 0, 0
	}
	return u, nil
}
