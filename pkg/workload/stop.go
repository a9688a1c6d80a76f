package workload

import (
	"context"
	"errors"
	"syscall"
	"time"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/oci"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// killLimit bounds the wait for a sandbox to end after SIGKILL; then its walls are taken down around it.
	killLimit = 10 * time.Second
	// signalLimit bounds the handing over of a signal to the agent, apart from the grace that the process gets.
	signalLimit = 5 * time.Second
)

// Stop sends the stop signal, waits for grace, then kills. It answers when the workload has ended; one that had ended
// before is left as it is. Once begun it goes on without its caller.
func (m *Manager) Stop(ctx context.Context, ref string, grace time.Duration) (Workload, error) {
	e, err := m.find(ref)
	if err != nil {
		return Workload{}, err
	}
	result := make(chan error, 1)
	m.owned.Go(func() { result <- e.stop(m.ctx, grace) })
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

func (e *entry) stop(ctx context.Context, grace time.Duration) error {
	for {
		rec, r, changed := e.peek()
		switch rec.Status.State {
		case StateExited, StateFailed:
			return nil
		case StateRunning, StateStopping:
			err := e.stopRun(ctx, rec, r, grace)
			if errors.Is(err, errMoved) {
				continue
			}
			return err
		case StatePaused:
			// Its stop signal is for it to act upon.
			if err := e.endPause(ctx, rec, r); err != nil {
				return err
			}
			continue
		case StateStarting:
			e.callOff("stopped")
		case StateDeleting:
			return e.gone()
		default:
			e.mu.Lock()
			defer e.mu.Unlock()
			return e.wrongStateLocked("running")
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return errClosing
		}
	}
}

// endPause lets a paused run go on to its end, or takes it down if it cannot be reached.
func (e *entry) endPause(ctx context.Context, rec record, r *run) error {
	if r != nil {
		return e.resume(r)
	}
	if err := e.abandon(ctx, rec.Run); err != nil && !errors.Is(err, errMoved) {
		return err
	}
	return nil
}

// stopRun ends one run: by the stop signal, by SIGKILL to everything in it, by taking its walls away. It never touches a
// later one.
func (e *entry) stopRun(ctx context.Context, rec record, r *run, grace time.Duration) error {
	if r == nil {
		return e.abandon(ctx, rec.Run)
	}
	over := func(now record) bool {
		return now.Run != rec.Run || terminal(now.Status.State) || now.Status.State == StateDeleting
	}
	if rec.Status.State == StateRunning {
		sig, err := e.stopSignal(rec)
		if err != nil {
			return err
		}
		still := func(now record) bool { return now.Run == rec.Run && now.Status.State == StateRunning }
		if err := e.moveState(still, StateStopping, nil); err != nil {
			return err
		}
		if grace > 0 {
			e.signal(ctx, r, sig, false)
		}
		fault.At("stop", "asked to end")
	}
	for _, step := range []struct {
		wait time.Duration
		then func()
	}{
		{grace, func() { e.signal(ctx, r, syscall.SIGKILL, true); fault.At("stop", "killed") }},
		{killLimit, func() { _ = e.kill(r) }},
	} {
		if done, err := e.awaitFor(ctx, step.wait, over); done || err != nil {
			return err
		}
		step.then()
	}
	_, err := e.await(ctx, over)
	return err
}

// signal hands a signal to the agent. That the process has ended meanwhile is what is wanted; an agent that does not answer
// loses its walls in the end.
func (e *entry) signal(ctx context.Context, r *run, sig syscall.Signal, all bool) {
	ctx, cancel := context.WithTimeout(ctx, signalLimit)
	defer cancel()
	_ = r.proc.Signal(ctx, int(sig), all)
}

// awaitFor is await for at most limit; running out of it is no error.
func (e *entry) awaitFor(ctx context.Context, limit time.Duration, done func(record) bool) (bool, error) {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	_, err := e.await(limited, done)
	if err == nil {
		return true, nil
	}
	if ctx.Err() == nil && limited.Err() != nil {
		return false, nil
	}
	return false, err
}

func (e *entry) stopSignal(rec record) (syscall.Signal, error) {
	img, err := e.m.cfg.Images.Get(e.digest)
	if err != nil {
		return 0, err
	}
	return oci.StopSignal(rec.Spec, img.Config)
}

func parseSignal(name string) (int, error) {
	sig, err := oci.ParseSignal(name)
	if err != nil {
		return 0, spec.Invalidf("signal", "%w", err)
	}
	return int(sig), nil
}

// Kill sends a signal, named (SIGTERM, TERM) or numbered, SIGKILL when empty. It may also hurry one that is being stopped.
func (m *Manager) Kill(ctx context.Context, ref, signal string) error {
	e, err := m.find(ref)
	if err != nil {
		return err
	}
	sig := int(syscall.SIGKILL)
	if signal != "" {
		if sig, err = parseSignal(signal); err != nil {
			return err
		}
	}
	rec, r, _ := e.peek()
	if rec.Status.State == StatePaused && sig == int(syscall.SIGKILL) && r != nil {
		// The agent delivers signals, and stands still as well. What is to be killed may go on for that long.
		if err := e.resume(r); err != nil {
			return err
		}
	}
	if rec.Status.State != StateStopping || r == nil {
		if r, err = e.running(); err != nil {
			return err
		}
	}
	return r.proc.Signal(ctx, sig, false)
}

// Wait answers when the workload is EXITED or FAILED.
func (m *Manager) Wait(ctx context.Context, ref string) (Workload, error) {
	e, err := m.find(ref)
	if err != nil {
		return Workload{}, err
	}
	return e.end(ctx)
}

// end waits for the end of a workload. One that is being deleted is gone, unless it was to be removed at its end: that may be faster
// than who waits for it, who is told how it had ended.
func (e *entry) end(ctx context.Context) (Workload, error) {
	rec, err := e.await(ctx, func(rec record) bool {
		return terminal(rec.Status.State) || rec.Status.State == StateDeleting
	})
	if err != nil {
		return Workload{}, err
	}
	w := rec.workload()
	if w.Status.State == StateDeleting {
		if !rec.RemoveWhenEnded || rec.Run == 0 {
			return Workload{}, e.gone()
		}
		w.Status.State = StateFailed
		if w.Status.Exit != nil {
			w.Status.State = StateExited
		}
	}
	return w, nil
}
