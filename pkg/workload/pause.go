package workload

import (
	"context"
	"errors"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Pause makes every process of a running workload stand still, across restarts of the daemon too. Pausing a paused one
// changes nothing.
func (m *Manager) Pause(ctx context.Context, ref string) (Workload, error) {
	e, err := m.find(ref)
	if err != nil {
		return Workload{}, err
	}
	if rec, _, _ := e.peek(); rec.Status.State == StatePaused {
		return e.workload(), nil
	}
	r, err := e.running()
	if err != nil {
		return Workload{}, err
	}
	if err := e.pause(ctx, r); err != nil {
		return Workload{}, err
	}
	return e.workload(), nil
}

// Resume lets a paused workload go on. Resuming one that runs changes nothing.
func (m *Manager) Resume(ctx context.Context, ref string) (Workload, error) {
	e, err := m.find(ref)
	if err != nil {
		return Workload{}, err
	}
	rec, r, _ := e.peek()
	switch {
	case rec.Status.State == StateRunning:
	case rec.Status.State != StatePaused:
		return Workload{}, e.wrongState("paused")
	case r == nil:
		e.mu.Lock()
		defer e.mu.Unlock()
		return Workload{}, e.unreachableLocked()
	default:
		if err := e.resume(r); err != nil {
			return Workload{}, err
		}
	}
	return e.workload(), nil
}

// pause stills one run. Its record says so first: a daemon that dies in between finds it, and stills it when it is back.
func (e *entry) pause(ctx context.Context, r *run) error {
	pauser, ok := r.inst.(runtime.Pauser)
	if !ok {
		return spec.Errorf(spec.KindUnsupported, "cannot pause workload %q: %s isolation cannot pause", e.name, e.isolation())
	}
	r.stillMu.Lock()
	defer r.stillMu.Unlock()
	if r.ended {
		return e.wrongState("running")
	}
	switch err := e.moveState(e.inState(r, StateRunning), StatePaused, nil); {
	case errors.Is(err, errMoved):
		if rec, now, _ := e.peek(); now == r && rec.Status.State == StatePaused {
			return nil
		}
		return e.wrongState("running")
	case err != nil:
		return err
	}
	r.client.Suspend()
	if err := pauser.Pause(ctx); err != nil {
		return errors.Join(err, e.goOnLocked(r))
	}
	fault.At("pause", "frozen")
	return nil
}

// resume lets one run go on.
func (e *entry) resume(r *run) error {
	r.stillMu.Lock()
	defer r.stillMu.Unlock()
	return e.goOnLocked(r)
}

// goOnLocked runs with r.stillMu held. The record says first that it runs: what is found frozen against its record is thawed.
func (e *entry) goOnLocked(r *run) error {
	if r.retain {
		// Callers of an earlier daemon left processes in it, and it could not be told before. While it is still paused to its
		// callers: what they exec once it is not must not be among those.
		if err := e.thaw(r); err != nil {
			return err
		}
		r.retain = false
		e.endOldSessions(e.m.ctx, r)
	}
	if err := e.moveState(e.inState(r, StatePaused), StateRunning, nil); err != nil {
		if errors.Is(err, errMoved) {
			return nil // it runs, or has come to its end
		}
		return err
	}
	return e.thaw(r)
}

// thaw brings what is real to RUNNING. Idempotent.
func (e *entry) thaw(r *run) error {
	var err error
	if pauser, ok := r.inst.(runtime.Pauser); ok {
		err = pauser.Resume()
	}
	fault.At("pause", "thawed")
	r.client.Resume()
	return err
}

// endStill is called once the process has ended: from here on it is never paused, and what was paused in that moment goes on,
// or its sandbox could not be shut down.
func (e *entry) endStill(r *run) {
	r.stillMu.Lock()
	defer r.stillMu.Unlock()
	r.ended = true
	if err := e.thaw(r); err != nil {
		e.m.cfg.Log.Error("cannot let a sandbox go on to its end", zap.String("workload", e.id), zap.Error(err))
	}
}

// still brings what is real to the record, when a daemon comes back: it may have died between the two.
func (e *entry) still(ctx context.Context, r *run, s State) error {
	pauser, ok := r.inst.(runtime.Pauser)
	if !ok {
		return nil
	}
	if s != StatePaused {
		return pauser.Resume()
	}
	r.retain = true
	r.client.Suspend()
	return pauser.Pause(ctx)
}

// inState accepts a record of this run that is in state s. Whether it is this run is fixed by the caller's r: a later run
// is another one.
func (e *entry) inState(r *run, s State) func(record) bool {
	return func(now record) bool { return e.run == r && now.Status.State == s }
}

func (e *entry) wrongState(need string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.wrongStateLocked(need)
}
