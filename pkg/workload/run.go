package workload

import (
	"context"

	"go.uber.org/zap"
)

// RunEvent is what happens to a workload in Run. They come in this order.
type RunEvent uint8

const (
	RunCreated RunEvent = iota + 1
	RunStarted
	// EXITED or FAILED.
	RunEnded
	RunRemoved
)

// RunOptions are what a caller of Run asks for.
type RunOptions struct {
	CreateOptions
	// Return when the process runs.
	Detach bool
	// fn is not called with RunCreated, and so nobody is told of a workload that a host which fails just then forgets.
	Quiet bool
	// Begin is told of each step that changes something before it is done: RunCreated, RunStarted, RunRemoved. Its answer is called
	// with how that went, before the caller of Run hears of it, in its words; both also when that caller has gone.
	Begin func(RunEvent) (done func(id string, err error) error)
}

// runStep is a step that is over: the workload as it was then, as it had ended if it has been removed.
type runStep struct {
	event    RunEvent
	workload Workload
	err      error
}

// Run creates a workload, starts it, waits for its end and, with RemoveWhenEnded, deletes it. fn is called with what
// happened, and the workload as it was then; of one that is removed, as it had ended. Once the workload is created all of this goes on
// without Run's caller: ctx, or an error of fn, only end Run. With an idempotency key a retry goes on with the workload of the
// first call, and starts nothing twice. After an error of the start what was to be removed is.
func (m *Manager) Run(ctx context.Context, o RunOptions, fn func(RunEvent, Workload) error) error {
	done := o.Begin(RunCreated)
	o.unsynced = o.Quiet
	w, err := m.Create(ctx, o.CreateOptions)
	if err := done(w.ID, err); err != nil {
		return err
	}
	e, err := m.find(w.ID)
	if err != nil {
		return err
	}
	steps := make(chan runStep, 3) // all that there can be: nobody waits for the caller
	m.owned.Go(func() {
		defer close(steps)
		e.runThrough(o, steps)
	})
	if !o.Quiet {
		if err := fn(RunCreated, w); err != nil {
			return err
		}
	}
	for {
		select {
		case s, more := <-steps:
			if !more {
				return nil
			}
			if s.err != nil {
				return s.err
			}
			if err := fn(s.event, s.workload); err != nil {
				return err
			}
			if o.Detach && s.event == RunStarted {
				return nil
			}
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// runThrough is what Run does after the creation.
func (e *entry) runThrough(o RunOptions, steps chan<- runStep) {
	remove := func() error {
		if !o.RemoveWhenEnded || e.m.ctx.Err() != nil { // Recover does it
			return nil
		}
		return e.removeEnded(o.Begin)
	}
	w, err := e.startOnce(o.Begin)
	if err != nil {
		e.logUnremoved(remove())
		steps <- runStep{err: err}
		return
	}
	steps <- runStep{event: RunStarted, workload: w}
	if o.Detach && !o.RemoveWhenEnded {
		return
	}
	w, err = e.end(e.m.ctx)
	if err != nil {
		steps <- runStep{err: err}
		return
	}
	steps <- runStep{event: RunEnded, workload: w}
	if !o.RemoveWhenEnded {
		return
	}
	err = remove()
	if err == nil {
		err = e.m.ctx.Err()
	}
	e.logUnremoved(err)
	steps <- runStep{event: RunRemoved, workload: w, err: err}
}

// startOnce starts a workload that never was.
func (e *entry) startOnce(begin func(RunEvent) func(string, error) error) (Workload, error) {
	if err := e.lock(e.m.ctx); err != nil {
		return Workload{}, err
	}
	if rec, _, _ := e.peek(); rec.Run > 0 {
		e.unlock()
		return rec.workload(), nil
	}
	done := begin(RunStarted)
	err := done(e.id, e.startHeld())
	return e.workload(), err
}

// removeEnded deletes a workload that is to be removed, once it has ended. That somebody else was faster is no error.
func (e *entry) removeEnded(begin func(RunEvent) func(string, error) error) error {
	for {
		if err := e.lock(e.m.ctx); err != nil {
			return err
		}
		rec, _, _ := e.peek()
		if !standing(rec.Status.State) {
			break
		}
		// It runs, or was started again by somebody.
		e.unlock()
		if _, err := e.await(e.m.ctx, func(rec record) bool { return !standing(rec.Status.State) }); err != nil {
			return err
		}
	}
	defer e.unlock()
	if !e.m.has(e) {
		return nil
	}
	done := begin(RunRemoved)
	err := done(e.id, e.delete())
	if err != nil {
		e.m.owned.Go(e.keepRemoving)
	}
	return err
}

func (e *entry) logUnremoved(err error) {
	if err != nil && e.m.ctx.Err() == nil {
		e.m.cfg.Log.Error("cannot remove a workload that has ended; once its removal has begun it is tried again, and when sandboxd is started the next time",
			zap.String("workload", e.id), zap.Error(err))
	}
}

// removeRecovered is for a workload whose Run ended with the daemon before.
func (e *entry) removeRecovered() {
	e.logUnremoved(e.removeEnded(func(RunEvent) func(string, error) error {
		w := e.workload()
		return func(_ string, err error) error {
			if e.m.cfg.Removed != nil {
				e.m.cfg.Removed(w, err)
			}
			return err
		}
	}))
}
