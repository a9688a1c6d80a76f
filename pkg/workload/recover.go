package workload

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/bootid"
	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/weaken"
)

const (
	// recoverAtOnce is how many workloads are brought back side by side.
	recoverAtOnce = 8
	// probeLimit bounds the question to an agent whether its process had started when the daemon died.
	probeLimit = 30 * time.Second
	// retainLimit bounds the clearing of an agent from an earlier daemon's sessions. An agent that does not answer must
	// not hold up the daemon's start.
	retainLimit = 5 * time.Second
	// attachRetryMin and Max space the attempts to have back a sandbox that may be running well.
	attachRetryMin, attachRetryMax = time.Second, 30 * time.Second
)

// Recover brings every record back to the truth: what runs is followed again, what was half made or half removed is
// undone, and what bears no record is removed. Call it once, before anything else. What cannot be recovered is logged and
// does not keep the daemon from the rest; an error means that ctx ended it early.
func (m *Manager) Recover(ctx context.Context) error {
	if !weaken.Without("removal of strays") {
		m.removeStrays(ctx)
	}
	fault.At("recover", "strays removed")
	var g errgroup.Group
	g.SetLimit(recoverAtOnce)
	for _, e := range m.entries() {
		g.Go(func() error {
			if err := e.recover(ctx); err != nil && ctx.Err() == nil {
				m.cfg.Log.Error("cannot recover workload", zap.String("workload", e.id), zap.Error(err))
			}
			if rec, _, _ := e.peek(); rec.RemoveWhenEnded {
				m.owned.Go(e.removeRecovered)
			}
			return ctx.Err()
		})
	}
	err := g.Wait()
	m.sweepSnapshots()
	return err
}

// removeStrays removes sandboxes and output that no record speaks of. What resists is there again at the next start.
func (m *Manager) removeStrays(ctx context.Context) {
	warn := func(what, id string, err error) {
		m.cfg.Log.Error("cannot remove "+what+" without a record", zap.String("id", id), zap.Error(err))
	}
	copies, err := m.store.damaged()
	if err != nil || len(copies) > 0 {
		m.cfg.Log.Error("records were damaged: what bears no record stays, since it may be of a workload whose record is lost; "+
			"look at it, then remove these copies and start sandboxd again, or remove single ones with `sandboxctl rm --force ID`",
			zap.Strings("copies", copies), zap.Strings("ids", m.lost(ctx, warn)), zap.Error(err))
		return
	}
	for isolation, rt := range m.cfg.Runtimes {
		ids, err := rt.List(ctx)
		if err != nil {
			warn("sandboxes", string(isolation), err)
		}
		for _, id := range ids {
			if e := m.byID[id]; e != nil && e.isolation() == isolation {
				continue
			}
			m.cfg.Log.Info("removing sandbox without a record", zap.String("id", id))
			if err := rt.Remove(ctx, id); err != nil {
				warn("sandbox", id, err)
			}
		}
	}
	m.leaveNetworks(ctx, warn)
	names, err := os.ReadDir(m.dir)
	if err != nil {
		warn("output", m.dir, err)
	}
	for _, n := range names {
		if n.IsDir() && m.byID[n.Name()] == nil {
			if err := os.RemoveAll(filepath.Join(m.dir, n.Name())); err != nil {
				warn("output", n.Name(), err)
			}
		}
	}
}

// leaveNetworks is removeStrays for networks, after the sandboxes that were joined to them have gone.
func (m *Manager) leaveNetworks(ctx context.Context, warn func(what, id string, err error)) {
	ids, err := m.cfg.Networks.List()
	if err != nil {
		warn("joined networks", "", err)
	}
	for _, id := range ids {
		if m.byID[id] != nil {
			continue // recover's
		}
		m.cfg.Log.Info("leaving the network of a sandbox without a record", zap.String("id", id))
		if err := m.cfg.Networks.Detach(ctx, id); err != nil {
			warn("network", id, err)
		}
	}
}

func (e *entry) recover(ctx context.Context) error {
	rec, _, _ := e.peek()
	// Of one that was to go on from a snapshot nobody was told, and that may be gone.
	if rec.Restoring || rec.Condemned || rec.Status.State == StateDeleting {
		err := e.removeRecorded()
		if err != nil {
			e.mu.Lock()
			e.unreachable = err
			e.mu.Unlock()
			e.m.owned.Go(e.keepRemoving)
		}
		return err
	}
	switch rec.Status.State {
	case StateStarting, StateRunning, StatePaused, StateStopping:
	default:
		return e.takeDown(ctx)
	}
	inst, err := e.runtime().Attach(ctx, e.id)
	switch {
	case err == nil:
		return e.adopt(ctx, rec, inst)
	case spec.KindOf(err) == spec.KindWrongState, rec.Status.State == StateStarting:
		return e.recoverGone(ctx, rec)
	}
	// It may be running well: only what is known to be gone is given up.
	e.mu.Lock()
	e.unreachable = err
	e.mu.Unlock()
	e.m.owned.Go(func() { e.keepAttaching(rec) })
	return err
}

// keepAttaching tries again and again to have the sandbox of an earlier daemon back.
func (e *entry) keepAttaching(rec record) {
	for wait := attachRetryMin; ; wait = min(2*wait, attachRetryMax) {
		select {
		case <-time.After(wait):
		case <-e.m.ctx.Done():
			return
		}
		if done := e.attachAgain(rec); done {
			return
		}
	}
}

func (e *entry) attachAgain(rec record) (done bool) {
	ctx, cancel := context.WithTimeout(e.m.ctx, probeLimit)
	defer cancel()
	if e.lock(ctx) != nil {
		return false
	}
	defer e.unlock()
	if now, _, _ := e.peek(); now.Run != rec.Run || now.Status.State != rec.Status.State {
		return true // it was abandoned meanwhile
	}
	inst, err := e.runtime().Attach(ctx, e.id)
	switch {
	case err == nil:
		err = e.adopt(ctx, rec, inst)
	case spec.KindOf(err) == spec.KindWrongState:
		err = e.recoverGone(ctx, rec)
	}
	if err != nil {
		e.mu.Lock()
		defer e.mu.Unlock()
		e.unreachable = err
		return false
	}
	return true
}

// abandon takes down the sandbox of a run that cannot be had back, because its caller wants it ended.
func (e *entry) abandon(ctx context.Context, n int) error {
	if err := e.lock(ctx); err != nil {
		return err
	}
	defer e.unlock()
	rec, r, _ := e.peek()
	if rec.Run != n || r != nil || !slices.Contains([]State{StateRunning, StatePaused, StateStopping}, rec.Status.State) {
		return errMoved
	}
	return e.recoverGone(ctx, rec)
}

// adopt follows the instance of an earlier daemon.
func (e *entry) adopt(ctx context.Context, rec record, inst runtime.Instance) error {
	fault.At("recover", "attached")
	r := &run{inst: inst, client: agent.New(inst.Dial, inst.Done())}
	r.proc = r.client.Process(runProcess(rec.Run))
	if err := e.still(ctx, r, rec.Status.State); err != nil {
		r.client.Close()
		return err
	}
	if err := e.settleSnapshots(ctx, r); err != nil {
		r.client.Close()
		return err
	}
	fault.At("recover", "stilled")
	switch rec.Status.State {
	case StateStarting:
		began, err := e.began(ctx, r)
		if err != nil || !began {
			r.client.Close()
			if err != nil {
				return err
			}
			return e.recoverGone(ctx, rec)
		}
		if err := e.setState(StateRunning, func(rec *record) {
			setFacts(rec, inst.Facts())
			rec.Status.StartedAt = time.Now().UTC()
		}); err != nil {
			r.client.Close()
			return err
		}
	case StateStopping:
		// Its grace went with the daemon that gave it.
		e.m.owned.Go(func() {
			e.signal(e.m.ctx, r, syscall.SIGKILL, true)
			over := func(now record) bool { return terminal(now.Status.State) || now.Run != rec.Run }
			if done, err := e.awaitFor(e.m.ctx, killLimit, over); !done && err == nil {
				_ = e.kill(r)
			}
		})
	}
	e.setRun(r)
	e.announce(EventRecovered, nil)
	fault.At("recover", "adopted")
	e.reapply(ctx, rec, r)
	if rec.Status.State != StatePaused { // then when it goes on
		e.endOldSessions(ctx, r)
	}
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

// began asks the agent of a workload that was STARTING whether its process was already running. An error is ctx's.
func (e *entry) began(ctx context.Context, r *run) (bool, error) {
	limited, cancel := context.WithTimeout(ctx, probeLimit)
	defer cancel()
	_, _, err := r.proc.WriteInput(limited, 0, nil, false)
	return err == nil, ctx.Err()
}

// recoverGone records the end of a workload whose walls are gone, or not worth keeping.
func (e *entry) recoverGone(ctx context.Context, rec record) error {
	if err := e.takeDown(ctx); err != nil {
		return err
	}
	fault.At("recover", "taken down")
	rebooted, err := bootid.Other(rec.Boot)
	if err != nil {
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
		switch {
		case rebooted && rec.Status.State == StateStarting:
			r.Status.Message = "the host was booted again while it was starting: start it again"
		case rebooted:
			r.Status.Message = "the host was booted again while it ran: start it again"
		case rec.Status.State == StateStarting:
			r.Status.Message = "sandboxd was restarted while it was starting: start it again"
		}
	})
}
