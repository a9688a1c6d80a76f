package main

import (
	"context"
	"errors"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/audit"
	"github.com/sandboxd/sandboxd/pkg/metrics"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// phaseBacklog is how many phases may wait to be counted: those of some thirty starts.
const phaseBacklog = 1024

// showMetrics counts and serves until the daemon ends; nil, and nothing is counted, without an address.
func (d *daemon) showMetrics(address string, manager *workload.Manager, trail *audit.Log, log *zap.Logger) (*metrics.Metrics, error) {
	if address == "" {
		return nil, nil
	}
	sources := metrics.Sources{
		Workloads: func() map[metrics.Group]int {
			out := map[metrics.Group]int{}
			for c, n := range manager.Count() {
				out[metrics.Group{Isolation: string(c.Isolation), State: string(c.State), Tenant: c.Tenant}] += n
			}
			return out
		},
		Committed:   manager.Committed,
		IsolationOf: func(id string) string { return string(manager.IsolationOf(id)) },
	}
	if trail != nil {
		sources.AuditLost = trail.Lost
	}
	m := metrics.New(spec.Version, spec.Commit, sources)
	// Whoever meets a phase may hold the manager's locks, which it takes to tell a workload's isolation.
	phases := make(chan phase.Record, phaseBacklog)
	phase.Observe(func(r phase.Record) {
		select {
		case phases <- r:
		default:
			m.Missed()
		}
	}, false)
	l, err := metrics.Listen(address)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() {
		if err := m.Serve(ctx, l); err != nil {
			log.Error("metrics are no longer shown", zap.Error(err))
		}
	})
	running.Go(func() { countEnds(ctx, manager, m) })
	running.Go(func() {
		for {
			select {
			case r := <-phases:
				m.Phase(r)
			case <-ctx.Done():
				return
			}
		}
	})
	d.onClose(func() error { cancel(); running.Wait(); return nil })
	return m, nil
}

// countEnds follows the events of the workloads.
func countEnds(ctx context.Context, manager *workload.Manager, m *metrics.Metrics) {
	since := time.Now()
	for ctx.Err() == nil {
		err := manager.Watch(ctx, "", since, func(e workload.Event) error {
			since = e.Time.Add(1)
			switch {
			case e.Type == workload.EventFailed:
				m.End(e.Isolation, "failed")
			case e.Type == workload.EventExited && e.Attributes["exit_code"] == "0":
				m.End(e.Isolation, "ok")
			case e.Type == workload.EventExited:
				m.End(e.Isolation, "error")
			}
			return nil
		})
		if spec.KindOf(err) != spec.KindExhausted || errors.Is(err, context.Canceled) {
			return // it ends with the manager
		}
		m.Missed()
	}
}
