package workload

import (
	"context"
	"errors"
	"fmt"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/oci"
	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Update changes a workload's limits: change edits what was asked for at its creation, where zero means the daemon's
// default. The policy is asked again, about the workload as it would be and for this caller, so that no limit is had this
// way that would have been refused at its creation. A workload that runs, or is paused, has the new limits when Update
// returns; another at its next start. After an error it has the old ones.
func (m *Manager) Update(ctx context.Context, ref string, caller spec.Caller, change func(*spec.Resources)) (Workload, error) {
	e, err := m.find(ref)
	if err != nil {
		return Workload{}, err
	}
	if err := e.lock(ctx); err != nil {
		return Workload{}, err
	}
	result := make(chan error, 1)
	m.owned.Go(func() {
		defer e.unlock()
		result <- e.update(m.ctx, caller, change)
	})
	select {
	case err := <-result:
		if err != nil {
			return Workload{}, err
		}
		return e.workload(), nil
	case <-ctx.Done():
		return Workload{}, ctx.Err()
	}
}

// update runs with e.op held.
func (e *entry) update(ctx context.Context, caller spec.Caller, change func(*spec.Resources)) error {
	rec, r, _ := e.peek()
	next := rec.Workload
	asked := rec.Asked
	change(&asked)
	next.Spec.Resources = withDefaults(asked, e.m.cfg.Defaults)
	decision, err := e.decideAgain(rec, asked, caller)
	if err != nil {
		return err
	}
	if err := e.checkUpdate(rec, r, next.Spec.Resources); err != nil {
		return err
	}
	// Durable first: a daemon that dies before the limits are changed changes them when it is back.
	before := rec
	record := func(to *record) func(*record) {
		return func(now *record) {
			now.Asked, now.Spec.Resources, now.Status.Decision = to.Asked, to.Spec.Resources, to.Status.Decision
		}
	}
	to := rec
	to.Asked, to.Spec.Resources, to.Status.Decision = asked, next.Spec.Resources, decision
	amend := func() error { return e.amend(record(&to)) }
	if holds(rec.Status.State) {
		if err := e.m.commit(e, to.Spec.Resources, amend); err != nil {
			return err
		}
	} else if err := amend(); err != nil {
		return err
	}
	fault.At("update", "recorded")
	if err := e.apply(ctx, r, next.Spec.Resources); err != nil {
		// Back to what was, as far as it goes; what does not is brought there when the daemon comes back.
		return errors.Join(err, e.amend(record(&before)), e.apply(ctx, r, before.Spec.Resources))
	}
	fault.At("update", "applied")
	e.announce(EventUpdated, nil)
	return nil
}

// amend changes the record of a workload, whatever its state is, and leaves that.
func (e *entry) amend(change func(*record)) error {
	if err := e.amendUnsynced(change); err != nil {
		return err
	}
	return e.sync()
}

func (e *entry) amendUnsynced(change func(*record)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	next := e.rec
	change(&next)
	written, err := e.m.store.put(&next)
	if err != nil {
		return err
	}
	e.change = written
	next.config = nil // stored
	e.rec = next
	return nil
}

// decideAgain asks the policy for the workload with other resources. The walls stay: an answer that demands stronger ones
// is a refusal.
func (e *entry) decideAgain(rec record, asked spec.Resources, caller spec.Caller) (policy.Decision, error) {
	img, err := e.m.cfg.Images.Get(e.digest)
	if err != nil {
		return policy.Decision{}, err
	}
	o := CreateOptions{Name: rec.Name, Labels: rec.Labels, Spec: rec.Spec, Caller: caller}
	o.Spec.Resources = asked
	decision, err := e.m.decide(o, img)
	if err != nil {
		return policy.Decision{}, err
	}
	has := rec.Status.Isolation
	if has.Weaker(decision.Isolation) {
		return policy.Decision{}, &spec.Error{Kind: spec.KindDenied, Reason: spec.ReasonPolicyDenied, Rule: decision.Rule,
			Err: fmt.Errorf("cannot update workload %q: with these limits the policy's rule %q demands %s isolation, and it has %s: make a new workload", e.name, decision.Rule, decision.Isolation, has)}
	}
	decision.Granted = has
	return decision, nil
}

// checkUpdate refuses what cannot be, before anything is recorded.
func (e *entry) checkUpdate(rec record, r *run, to spec.Resources) error {
	img, err := e.m.cfg.Images.Get(e.digest)
	if err != nil {
		return err
	}
	w := rec.Spec
	w.Resources = to
	if _, err := oci.Config(e.id, w, img.Config, rec.Status.Isolation); err != nil {
		return err
	}
	if err := e.m.checkLimits(rec.Status.Isolation, to); err != nil {
		return err
	}
	switch s := rec.Status.State; {
	case s == StateCreated, terminal(s):
		if rec.Run > 0 && to.DiskBytes != rec.Spec.Resources.DiskBytes {
			return spec.Errorf(spec.KindWrongState, "the writable layer of workload %q has been made, and keeps its size: make a new workload with the size it needs", e.name)
		}
		return nil
	case s != StateRunning && s != StatePaused:
		return spec.Errorf(spec.KindWrongState, "workload %q is %s: its limits can be changed while it is created, running, paused, exited or failed", e.name, s)
	case r == nil:
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.unreachableLocked()
	}
	updater, ok := r.inst.(runtime.Updater)
	if !ok {
		return spec.Errorf(spec.KindWrongState, "workload %q runs with %s isolation, whose limits cannot be changed while it does: stop it first", e.name, rec.Status.Isolation)
	}
	if err := updater.CheckUpdate(rec.Spec.Resources, to); err != nil {
		return fmt.Errorf("cannot update workload %q: %w", e.name, err)
	}
	return nil
}

// apply gives limits to what is there to have them.
func (e *entry) apply(ctx context.Context, r *run, to spec.Resources) error {
	e.logMu.Lock()
	if e.log != nil {
		e.log.setLimit(to.LogBytes)
	}
	e.logMu.Unlock()
	if r == nil {
		return nil
	}
	updater, ok := r.inst.(runtime.Updater)
	if !ok {
		return nil
	}
	err := updater.Update(ctx, to)
	select {
	case <-r.inst.Done():
		return nil // it has ended meanwhile: they count from its next start on
	default:
		return err
	}
}

// reapply gives a sandbox that an earlier daemon left the limits its record speaks of.
func (e *entry) reapply(ctx context.Context, rec record, r *run) {
	if err := e.apply(ctx, r, rec.Spec.Resources); err != nil {
		e.m.cfg.Log.Error("cannot give a sandbox the limits its record has", zap.String("workload", e.id), zap.Error(err))
	}
}

// checkLimits refuses limits that this host cannot enforce behind that wall.
func (m *Manager) checkLimits(i spec.Isolation, r spec.Resources) error {
	if checker, ok := m.cfg.Runtimes[i].(runtime.LimitChecker); ok {
		return checker.CheckLimits(r)
	}
	return nil
}
