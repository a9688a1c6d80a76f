package workload

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/weaken"
)

const (
	// drainLimit bounds the reading of what a dead process left in its pipes. Everything that could write is dead by
	// then, so only a stuck agent or a full disk takes long.
	drainLimit = 30 * time.Second
	// shutdownLimit bounds the agent's orderly end, in which a guest writes back what it has not written to its disk yet:
	// gigabytes, on a slow one. Whoever does not want to wait removes the workload by force.
	shutdownLimit = 2 * time.Minute
	// logRetry is the pause after the output log could not be written, as on a full disk. Meanwhile the process's
	// writes wait: nothing is dropped.
	logRetry = time.Second
)

// supervise follows a running process to its end, then takes the walls down. It lets go, touching nothing, when the
// manager closes.
func (e *entry) supervise(r *run) {
	defer r.client.Close()
	pumped := make(chan error, 1)
	pumpCtx, stopPump := context.WithCancel(e.m.ctx)
	defer stopPump()
	go func() { pumped <- e.pump(pumpCtx, r) }()

	end := phase.Begin(e.id, "process runs")
	exit, err := r.proc.Wait(e.m.ctx)
	end()
	if err == nil {
		fault.At("end", "seen")
		e.endStill(r)
		end := phase.Begin(e.id, "last output")
		err = e.drain(r, pumped)
		end()
		if err != nil && e.m.ctx.Err() == nil {
			e.m.cfg.Log.Error("output may be incomplete", zap.String("workload", e.id), zap.Error(err))
		}
		fault.At("end", "output complete")
		e.finish(r, &exit, err)
		return
	}
	stopPump()
	<-pumped
	e.finish(r, nil, err)
}

// drain kills what the workload's own process left behind and waits for the last output.
func (e *entry) drain(r *run, pumped <-chan error) error {
	ctx, cancel := context.WithTimeout(e.m.ctx, drainLimit)
	defer cancel()
	select {
	case err := <-pumped:
		return err // nobody holds its output open, so nobody has anything to say
	default:
	}
	if err := r.proc.Signal(ctx, int(syscall.SIGKILL), true); err != nil {
		e.m.cfg.Log.Warn("cannot kill what the process left behind", zap.String("workload", e.id), zap.Error(err))
	}
	select {
	case err := <-pumped:
		return err
	case <-ctx.Done():
		return errors.New("its end was not seen in time")
	}
}

// pump brings the process's output into the log until it ends, or the sandbox does. Whatever else goes wrong is tried
// again: meanwhile the process waits, and nothing is lost.
func (e *entry) pump(ctx context.Context, r *run) error {
	for warned := false; ; warned = true {
		err := e.pumpOnce(ctx, r)
		if err == nil || ctx.Err() != nil {
			return err
		}
		select {
		case <-r.inst.Done():
			return err
		default:
		}
		if !warned {
			e.m.cfg.Log.Error("cannot read output; trying again", zap.String("workload", e.id), zap.Error(err))
		}
		select {
		case <-time.After(logRetry):
		case <-r.inst.Done():
		case <-ctx.Done():
		}
	}
}

func (e *entry) pumpOnce(ctx context.Context, r *run) error {
	log, err := e.output()
	if err != nil {
		return err
	}
	rec, _, _ := e.peek()
	for {
		end, _ := log.end()
		chunks, eof, err := r.proc.ReadOutput(ctx, end.offset-rec.LogBase+rec.OutputBefore)
		if err != nil {
			return err
		}
		for _, c := range chunks {
			if err := e.appendOutput(ctx, log, LogEntry{Time: c.Time, Stream: Stream(c.Stream), Data: c.Data}); err != nil {
				return err
			}
		}
		if eof {
			return nil
		}
	}
}

func (e *entry) appendOutput(ctx context.Context, log *outputLog, entry LogEntry) error {
	for warned := false; ; warned = true {
		err := log.append(entry)
		if err == nil {
			return nil
		}
		if !warned {
			e.m.cfg.Log.Error("cannot write output; the workload waits until it can be written", zap.String("workload", e.id), zap.Error(err))
		}
		select {
		case <-time.After(logRetry):
		case <-ctx.Done():
			return err
		}
	}
}

// finish records how the process ended, takes the walls down and says so. exit is nil when the sandbox went away
// without the process's end having been seen; it may still have been recorded by an earlier daemon.
func (e *entry) finish(r *run, exit *spec.Exit, cause error) {
	if e.m.ctx.Err() != nil {
		return
	}
	var doubts []string
	var oom *OOM
	if exit == nil || exit.Code != 0 { // one that did what it was to do lacked nothing
		if oom = e.oom(r); oom != nil {
			doubts = append(doubts, oom.String())
		}
	}
	recorded := func() error { return nil }
	if exit != nil {
		if cause != nil {
			doubts = append(doubts, "its last output may be missing: "+cause.Error())
		}
		if !weaken.Without("record of an exit before its sandbox goes") {
			e.mustState(StateStopping, func(rec *record) { rec.Status.Exit = exit })
		}
		// Who waits for the end is told its code, and only when that is on the disk; the walls come down meanwhile.
		recorded = e.syncBeside()
		end := phase.Begin(e.id, "call: shut down")
		err := e.shutDown(r)
		end()
		fault.At("end", "shut down")
		if err != nil {
			e.m.cfg.Log.Warn("sandbox did not shut down in order", zap.String("workload", e.id), zap.Error(err))
			doubts = append(doubts, "what it wrote last to its disk may be missing: "+err.Error())
		}
	} else if rec, _, _ := e.peek(); rec.Status.Exit != nil {
		exit = rec.Status.Exit
	}
	e.release()
	fault.At("end", "released")
	if exit == nil {
		e.mustState(StateFailed, func(rec *record) {
			rec.Status.Message = strings.Join(append([]string{"the sandbox ended before its process was seen to end: " + why(r, cause)}, doubts...), "; ")
			rec.Status.HostPID = 0
			rec.Status.OOM = oom
		})
		return
	}
	e.logUnsynced(recorded())
	e.mustState(StateExited, func(rec *record) {
		rec.Status.Exit = exit
		rec.Status.Message = strings.Join(append([]string{exitMessage(*exit)}, doubts...), "; ")
		rec.Status.HostPID = 0
		rec.Status.OOM = oom
	})
}

// why is what the runtime knows of an end, or else what was seen of it. If what was seen is not that the sandbox had ended, this
// daemon ended it because of that, which is all that the runtime would know.
func why(r *run, seen error) string {
	if spec.KindOf(seen) != spec.KindWrongState {
		return fmt.Sprint(seen)
	}
	if x, ok := r.inst.(runtime.Explainer); ok && x.Why() != "" {
		return x.Why()
	}
	return fmt.Sprint(seen)
}

// shutDown has the agent end the sandbox in order, its writable layer written back. A sandbox that was killed meanwhile
// has ended as its killer wanted.
func (e *entry) shutDown(r *run) error {
	ctx, cancel := context.WithTimeout(e.m.ctx, shutdownLimit)
	defer cancel()
	if _, clean := r.inst.(runtime.CleanKiller); clean {
		// Its end is waited for by the release that follows.
		return r.inst.Kill()
	}
	if err := r.client.Shutdown(ctx, 0); err != nil {
		return err
	}
	select {
	case <-r.inst.Done():
		return nil
	case <-ctx.Done():
		return errors.New("its end was not seen in time")
	}
}

func exitMessage(x spec.Exit) string {
	if x.Signal != 0 {
		return fmt.Sprintf("ended by signal %d (%s)", x.Signal, syscall.Signal(x.Signal))
	}
	return fmt.Sprintf("exited with code %d", x.Code)
}
