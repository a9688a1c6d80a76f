package workload

import (
	"context"
	"syscall"
	"time"

	"github.com/sandboxd/sandboxd/pkg/oci"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// killLimit bounds the wait for a sandbox to end after SIGKILL; then its walls are taken down around it.
const killLimit = 10 * time.Second

// Stop sends the stop signal, waits for grace, then kills. It answers when the workload has ended; one that had ended
// before is left as it is.
func (m *Manager) Stop(ctx context.Context, ref string, grace time.Duration) (Workload, error) {
	e, err := m.find(ref)
	if err != nil {
		return Workload{}, err
	}
	if err := e.stop(ctx, grace); err != nil {
		return Workload{}, err
	}
	return e.workload(), nil
}

func (e *entry) stop(ctx context.Context, grace time.Duration) error {
	rec, r, _ := e.peek()
	switch rec.Status.State {
	case StateExited, StateFailed:
		return nil
	case StateStarting:
		e.mu.Lock()
		e.cancelStart()
		e.mu.Unlock()
		_, err := e.await(ctx, func(rec record) bool { return rec.Status.State != StateStarting })
		if err != nil {
			return err
		}
		return e.stop(ctx, grace) // it may have begun to run just before
	case StateRunning:
	case StateStopping:
	default:
		e.mu.Lock()
		defer e.mu.Unlock()
		return e.wrongStateLocked("running")
	}
	if rec.Status.State == StateRunning {
		if err := e.setState(StateStopping, nil); err != nil {
			return err
		}
		if r != nil && grace > 0 {
			sig, err := e.stopSignal(rec)
			if err != nil {
				return err
			}
			sigCtx, cancel := context.WithTimeout(ctx, grace)
			// A process that ended meanwhile is what is wanted.
			_ = r.proc.Signal(sigCtx, sig, false)
			cancel()
		}
	}
	if done, err := e.awaitEnd(ctx, grace); done || err != nil {
		return err
	}
	if r != nil {
		sigCtx, cancel := context.WithTimeout(ctx, killLimit)
		_ = r.proc.Signal(sigCtx, int(syscall.SIGKILL), true)
		cancel()
		if done, err := e.awaitEnd(ctx, killLimit); done || err != nil {
			return err
		}
		_ = r.inst.Kill()
	}
	_, err := e.await(ctx, func(rec record) bool { return terminal(rec.Status.State) })
	return err
}

// awaitEnd waits for at most limit; running out of it is no error.
func (e *entry) awaitEnd(ctx context.Context, limit time.Duration) (bool, error) {
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	_, err := e.await(limited, func(rec record) bool { return terminal(rec.Status.State) })
	if err == nil {
		return true, nil
	}
	if ctx.Err() == nil && limited.Err() != nil {
		return false, nil
	}
	return false, err
}

func (e *entry) stopSignal(rec record) (int, error) {
	name := rec.Spec.StopSignal
	if name == "" {
		if img, err := e.m.cfg.Images.Get(e.digest); err == nil {
			name = img.Config.StopSignal
		}
	}
	if name == "" {
		return int(syscall.SIGTERM), nil
	}
	return parseSignal(name)
}

func parseSignal(name string) (int, error) {
	sig, err := oci.ParseSignal(name)
	if err != nil {
		return 0, spec.Invalidf("signal", "%w", err)
	}
	return int(sig), nil
}

// Kill sends a signal, named (SIGTERM, TERM) or numbered, SIGKILL when empty.
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
	r, err := e.running()
	if err != nil {
		return err
	}
	return r.proc.Signal(ctx, sig, false)
}

// Wait answers when the workload is EXITED or FAILED.
func (m *Manager) Wait(ctx context.Context, ref string) (Workload, error) {
	e, err := m.find(ref)
	if err != nil {
		return Workload{}, err
	}
	rec, err := e.await(ctx, func(rec record) bool {
		return terminal(rec.Status.State) || rec.Status.State == StateDeleting
	})
	if err != nil {
		return Workload{}, err
	}
	if rec.Status.State == StateDeleting {
		e.mu.Lock()
		defer e.mu.Unlock()
		return Workload{}, e.goneLocked()
	}
	return e.workload(), nil
}
