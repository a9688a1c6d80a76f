package workload

import (
	"context"
	"fmt"
	"os"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// recoverAtOnce is how many workloads are brought back side by side.
	recoverAtOnce = 8
	// probeLimit bounds the question to an agent whether its process had started when the daemon died.
	probeLimit = 30 * time.Second
	// retainLimit bounds the clearing of an agent from an earlier daemon's sessions. An agent that does not answer must
	// not hold up the daemon's start.
	retainLimit = 5 * time.Second
)

// Recover brings every record back to the truth: what runs is followed again, what was half made or half removed is
// undone, and what bears no record is removed. Call it once, before anything else.
func (m *Manager) Recover(ctx context.Context) error {
	if err := m.removeStrays(ctx); err != nil {
		return err
	}
	var g errgroup.Group
	g.SetLimit(recoverAtOnce)
	for _, e := range m.entries() {
		g.Go(func() error {
			if err := e.recover(ctx); err != nil {
				return fmt.Errorf("cannot recover workload %s: %w", e.id, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// removeStrays removes sandboxes and output that no record speaks of.
func (m *Manager) removeStrays(ctx context.Context) error {
	for isolation, rt := range m.cfg.Runtimes {
		ids, err := rt.List(ctx)
		if err != nil {
			return fmt.Errorf("cannot list %s sandboxes: %w", isolation, err)
		}
		for _, id := range ids {
			if e := m.byID[id]; e != nil && e.isolation() == isolation {
				continue
			}
			m.cfg.Log.Info("removing sandbox without a record", zap.String("sandbox", id))
			if err := rt.Remove(ctx, id); err != nil {
				return fmt.Errorf("cannot remove stray sandbox %s: %w", id, err)
			}
		}
	}
	names, err := os.ReadDir(m.dir)
	if err != nil {
		return fmt.Errorf("cannot read state directory: %w", err)
	}
	for _, n := range names {
		if n.IsDir() && m.byID[n.Name()] == nil {
			if err := os.RemoveAll((&entry{m: m, id: n.Name()}).dir()); err != nil {
				return fmt.Errorf("cannot remove stray output: %w", err)
			}
		}
	}
	return nil
}

func (e *entry) recover(ctx context.Context) error {
	rec, _, _ := e.peek()
	switch rec.Status.State {
	case StateDeleting:
		return e.remove()
	case StateStarting, StateRunning, StateStopping:
	default:
		return e.runtime().Release(ctx, e.id)
	}
	inst, err := e.runtime().Attach(ctx, e.id)
	if err != nil {
		// One sandbox that cannot be had back must not keep the daemon from all the others.
		if spec.KindOf(err) != spec.KindWrongState {
			e.m.cfg.Log.Error("cannot attach to sandbox; taking it down", zap.String("workload", e.id), zap.Error(err))
		}
		return e.recoverGone(ctx, rec)
	}
	r := &run{inst: inst, client: agent.New(inst.Dial, inst.Done())}
	r.proc = r.client.Process(runProcess(rec.Run))
	switch {
	case rec.Status.State == StateStarting && !e.began(ctx, r):
		r.client.Close()
		return e.recoverGone(ctx, rec)
	case rec.Status.State == StateStarting:
		if err := e.setState(StateRunning, func(rec *record) {
			setFacts(rec, inst.Facts())
			rec.Status.StartedAt = time.Now().UTC()
		}); err != nil {
			return err
		}
	case rec.Status.State == StateStopping:
		// Its grace went with the daemon that gave it.
		e.m.owned.Go(func() {
			ctx, cancel := context.WithTimeout(e.m.ctx, killLimit)
			defer cancel()
			if err := r.proc.Signal(ctx, int(syscall.SIGKILL), true); err != nil && e.m.ctx.Err() == nil {
				_ = inst.Kill()
			}
		})
	}
	e.setRun(r)
	e.announce(EventRecovered, nil)
	e.endOldSessions(ctx, r)
	e.m.owned.Go(func() { e.supervise(r) })
	return nil
}

// endOldSessions ends what callers of the daemon before had exec'd: their sessions are gone. It returns before new callers
// can come.
func (e *entry) endOldSessions(ctx context.Context, r *run) {
	ctx, cancel := context.WithTimeout(ctx, retainLimit)
	defer cancel()
	if err := r.client.Retain(ctx, r.proc.ID); err != nil && spec.KindOf(err) != spec.KindWrongState {
		e.m.cfg.Log.Warn("cannot end processes whose callers are gone", zap.String("workload", e.id), zap.Error(err))
	}
}

// began asks the agent of a workload that was STARTING whether its process was already running.
func (e *entry) began(ctx context.Context, r *run) bool {
	ctx, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	_, _, err := r.proc.WriteInput(ctx, 0, nil, false)
	return err == nil
}

// recoverGone records the end of a workload whose walls are gone, or not worth keeping.
func (e *entry) recoverGone(ctx context.Context, rec record) error {
	if err := e.runtime().Release(ctx, e.id); err != nil {
		return err
	}
	if exit := rec.Status.Exit; exit != nil && rec.Status.State == StateStopping {
		return e.setState(StateExited, func(r *record) {
			r.Status.Message = exitMessage(*exit)
			r.Status.HostPID = 0
		})
	}
	return e.setState(StateFailed, func(r *record) {
		r.Status.HostPID = 0
		r.Status.Message = "its sandbox was gone when sandboxd came back"
		if rec.Status.State == StateStarting {
			r.Status.Message = "sandboxd was restarted while it was starting: start it again"
		}
	})
}
