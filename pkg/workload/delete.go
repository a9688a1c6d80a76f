package workload

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Delete removes a workload, its output and its writable layer; one that runs only with force, which kills it. Once
// begun it goes on without its caller, and after a restart. With force it also removes what is left of a workload whose record
// was lost to a damaged journal, by its full id.
func (m *Manager) Delete(ctx context.Context, ref string, force bool) error {
	e, err := m.find(ref)
	if force && spec.KindOf(err) == spec.KindNotFound {
		return m.removeLost(ctx, ref, err)
	}
	if err != nil {
		return err
	}
	remove := e.removeByForce
	if !force {
		if err := e.lock(ctx); err != nil {
			return err
		}
		remove = func() error {
			defer e.unlock()
			return e.delete()
		}
	}
	result := make(chan error, 1)
	m.owned.Go(func() {
		result <- remove()
		e.keepRemoving()
	})
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// removeByForce ends a workload, whatever it is doing, and removes it. That it is to be removed is on the disk before anything
// of it is killed: the daemon may die in between, and the next one finishes it.
func (e *entry) removeByForce() error {
	for {
		rec, _, _ := e.peek()
		if !standing(rec.Status.State) {
			if err := e.lock(e.m.ctx); err != nil {
				return err
			}
			// Who had the lock may have started it.
			if rec, _, _ := e.peek(); !standing(rec.Status.State) {
				defer e.unlock()
				return e.delete()
			}
			e.unlock()
			continue
		}
		if !rec.Condemned {
			if err := e.amend(func(r *record) { r.Condemned = true }); err != nil {
				return err
			}
			fault.At("delete", "asked for")
		}
		if err := e.killWalls(e.m.ctx); err != nil {
			return err
		}
		fault.At("delete", "walls killed")
	}
}

// standing reports whether a workload of that state may have walls that somebody is using.
func standing(s State) bool { return s != StateCreated && s != StateDeleting && !terminal(s) }

// killWalls ends a workload at once, whatever it is doing.
func (e *entry) killWalls(ctx context.Context) error {
	for {
		rec, r, changed := e.peek()
		switch rec.Status.State {
		case StateStarting:
			e.callOff("removed")
		case StateRunning, StatePaused, StateStopping:
			if r == nil {
				if err := e.abandon(ctx, rec.Run); err != nil && !errors.Is(err, errMoved) {
					return err
				}
				continue
			}
			if err := e.kill(r); err != nil {
				return err
			}
		default:
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return errClosing
		}
	}
}

// delete runs with e.op held.
func (e *entry) delete() error {
	e.mu.Lock()
	switch s := e.rec.Status.State; {
	case s == StateCreated, s == StateDeleting, terminal(s):
		e.mu.Unlock()
	default:
		defer e.mu.Unlock()
		return spec.Errorf(spec.KindWrongState, "workload %q is %s: stop it first, or remove it by force (`sandboxctl rm -f`)", e.name, s)
	}
	if !e.m.has(e) {
		return spec.Errorf(spec.KindNotFound, "no workload %q: it was deleted meanwhile", e.name)
	}
	return e.removeRecorded()
}

// removeRecorded is remove, once the state says so. One that is being removed already needs no room for another record: it makes
// some.
func (e *entry) removeRecorded() error {
	if rec, _, _ := e.peek(); rec.Status.State != StateDeleting {
		if err := e.setState(StateDeleting, nil); err != nil {
			return err
		}
	}
	return e.remove()
}

const (
	// removeRetryMin and Max space the attempts to finish a removal that failed: what was in its way (a full disk, a mount that
	// is busy) may go by itself.
	removeRetryMin, removeRetryMax = time.Second, time.Minute
	// removeRetries bounds them, about an hour; then it takes a caller, or the next daemon.
	removeRetries = 64
)

// keepRemoving tries again to finish a removal that was begun, or asked for by force, one at a time for a workload, until it is
// done. A caller who asks meanwhile is as good.
func (e *entry) keepRemoving() {
	removing := func() bool {
		rec, _, _ := e.peek()
		return (rec.Status.State == StateDeleting || rec.Condemned) && e.m.has(e)
	}
	if !removing() || !e.removing.CompareAndSwap(false, true) {
		return
	}
	defer e.removing.Store(false)
	wait := removeRetryMin
	for range removeRetries {
		select {
		case <-time.After(wait):
		case <-e.m.ctx.Done():
			return
		}
		if !removing() {
			return
		}
		err := e.removeByForce()
		if err == nil || e.m.ctx.Err() != nil {
			return
		}
		e.m.cfg.Log.Warn("cannot finish removing a workload; it is tried again", zap.String("workload", e.id), zap.Error(err))
		wait = min(2*wait, removeRetryMax)
	}
}

// remove finishes what the state DELETING promises.
func (e *entry) remove() error {
	// Once the caller is told that it is gone it must not come back, also if the last record, that there is none, is lost.
	recorded := e.syncBeside()
	e.closeLog()
	ctx, cancel := context.WithTimeout(context.Background(), releaseLimit)
	defer cancel()
	if err := e.runtime().Remove(ctx, e.id); err != nil {
		return fmt.Errorf("cannot remove sandbox of workload %q: %w", e.name, err)
	}
	fault.At("delete", "sandbox removed")
	if err := e.m.cfg.Networks.Detach(ctx, e.id); err != nil {
		return fmt.Errorf("cannot remove workload %q: %w", e.name, err)
	}
	fault.At("delete", "network left")
	if err := os.RemoveAll(e.dir()); err != nil {
		return fmt.Errorf("cannot remove output of workload %q: %w", e.name, err)
	}
	fault.At("delete", "output removed")
	end := phase.Begin(e.id, "record gone")
	err := recorded()
	if err == nil {
		fault.At("record", "before gone")
		_, err = e.m.store.delete(e.id)
		fault.At("record", "gone")
	}
	end()
	if err != nil {
		return err
	}
	e.m.forget(e)
	e.announce(EventDeleted, nil)
	return nil
}
