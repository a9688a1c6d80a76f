package workload

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/bootid"
	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/oci"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// RestoreOptions are what a caller of RestoreSnapshot and Fork asks for.
type RestoreOptions struct {
	// As in CreateOptions.
	Name string
	Key  string
	// Beside those of the workload that the snapshot was taken of, or in their place; the tenant stays.
	Labels map[string]string
	// Empty for the one that a workload without has.
	Hostname string
	Caller   spec.Caller
}

// RestoreSnapshot makes a workload that goes on where the snapshot's was, and answers when it runs. If that fails there is none.
func (m *Manager) RestoreSnapshot(ctx context.Context, ref string, o RestoreOptions) (Workload, error) {
	s, err := m.snapshots.hold(ref)
	if err != nil {
		return Workload{}, err
	}
	defer m.snapshots.release(s)
	return m.restore(ctx, s, o.create(s, s.ID))
}

// Fork makes a workload that goes on where a running one is, which goes on too.
func (m *Manager) Fork(ctx context.Context, ref string, o RestoreOptions) (Workload, error) {
	e, err := m.find(ref)
	if err != nil {
		return Workload{}, err
	}
	rec, _, _ := e.peek()
	of := o.create(&snapshotRecord{Snapshot: Snapshot{Labels: rec.Labels, Spec: rec.Spec}, Asked: rec.Asked}, "fork "+e.id)
	if w, done, err := m.madeBefore(of); done || err != nil {
		return w, err
	}
	// What will be refused need not be asked for.
	img, err := m.cfg.Images.Get(e.digest)
	if err != nil {
		return Workload{}, err
	}
	if _, err := m.decide(of, img); err != nil {
		return Workload{}, err
	}
	s, err := m.takeSnapshot(ctx, e, CreateSnapshotOptions{transient: true})
	if err != nil {
		return Workload{}, err
	}
	defer func() {
		if err := m.snapshots.drop(s); err != nil {
			m.cfg.Log.Error("cannot remove what a workload was forked from; the next start of sandboxd does", zap.String("snapshot", s.ID), zap.Error(err))
		}
	}()
	return m.restore(ctx, s, o.create(s, "fork "+e.id))
}

// create is what a creation is asked for. from tells keys apart.
func (o RestoreOptions) create(s *snapshotRecord, from string) CreateOptions {
	labels := maps.Clone(s.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	maps.Copy(labels, o.Labels)
	w := s.AskedSpec(s.Asked)
	w.Hostname = o.Hostname
	return CreateOptions{Name: o.Name, Labels: labels, Spec: w, Caller: o.Caller, Key: o.Key, from: from, snapshot: s}
}

// madeBefore answers with the workload of a key that was used.
func (m *Manager) madeBefore(o CreateOptions) (Workload, bool, error) {
	asked, err := o.once()
	if err != nil || asked == nil {
		return Workload{}, false, err
	}
	m.mu.Lock()
	e := m.byKey[onceID{o.Caller.Key(), o.Key}]
	m.mu.Unlock()
	if e == nil {
		return Workload{}, false, nil
	}
	w, err := e.again(asked)
	return w, true, err
}

// restore makes the workload and has it go on. Whoever comes with a key that was used gets that workload once it runs.
func (m *Manager) restore(ctx context.Context, s *snapshotRecord, o CreateOptions) (Workload, error) {
	if o.Labels[spec.TenantLabel] != s.Labels[spec.TenantLabel] {
		return Workload{}, spec.Errorf(spec.KindDenied, "a snapshot of tenant %q cannot go on as a workload of tenant %q: its memory is the former's", s.Labels[spec.TenantLabel], o.Labels[spec.TenantLabel])
	}
	w, err := m.Create(ctx, o)
	if err != nil {
		return Workload{}, err
	}
	fault.At("restore", "created")
	m.mu.Lock()
	e := m.byID[w.ID]
	m.mu.Unlock()
	if e == nil {
		return Workload{}, NotFound(w.ID)
	}
	if err := e.lock(m.ctx); err != nil {
		return Workload{}, err
	}
	result := make(chan error, 1)
	m.owned.Go(func() {
		defer e.unlock()
		result <- e.restoreHeld(s)
	})
	if err := <-result; err != nil {
		return Workload{}, err
	}
	return e.workload(), nil
}

// restoreHeld runs with e.op held. What could not go on is removed: it never was.
func (e *entry) restoreHeld(s *snapshotRecord) error {
	if rec, _, _ := e.peek(); !rec.Restoring {
		return nil // of an earlier call with the same key
	}
	ctx, cancel := context.WithTimeoutCause(e.m.ctx, startLimit, spec.Errorf(spec.KindUnavailable,
		"workload %q did not go on from the snapshot within %v: the host may be overloaded; try again", e.name, startLimit))
	defer cancel()
	err := e.restore(ctx, s)
	if err == nil {
		return nil
	}
	if e.m.ctx.Err() != nil {
		return errors.Join(errClosing, err) // Recover removes it
	}
	return errors.Join(err, e.delete())
}

func (e *entry) restore(ctx context.Context, s *snapshotRecord) error {
	config, err := e.restoredConfig(s)
	if err != nil {
		return err
	}
	if _, err := e.output(); err != nil {
		return err
	}
	boot, err := bootid.Host()
	if err != nil {
		return err
	}
	rec, _, _ := e.peek()
	if err := e.m.commit(e, rec.Spec.Resources, func() error {
		return e.setState(StateStarting, func(r *record) {
			r.Run, r.Boot, r.LogBase, r.OutputBefore = s.Run, boot, 0, s.Output
		})
	}); err != nil {
		return err
	}
	if err := e.sync(); err != nil {
		return e.startFailed(ctx, err)
	}
	r, err := e.goOnFrom(ctx, s, config)
	if err != nil {
		return e.startFailed(ctx, err)
	}
	e.m.owned.Go(func() { e.supervise(r) })
	return nil
}

// restoredConfig is the configuration that the snapshot's agent was given, with what is the new workload's own.
func (e *entry) restoredConfig(s *snapshotRecord) (*specs.Spec, error) {
	img, err := e.m.cfg.Images.Get(e.digest)
	if err != nil {
		return nil, err
	}
	rec, _, _ := e.peek()
	own, err := oci.Config(e.id, rec.Spec, img.Config, rec.Status.Isolation)
	if err != nil || s.Config == nil {
		return own, err
	}
	config := new(specs.Spec)
	if err := json.Unmarshal(s.Config, config); err != nil {
		return nil, fmt.Errorf("cannot read the configuration of snapshot %s: %w", s.ID[:12], err)
	}
	config.Hostname, config.Annotations = own.Hostname, own.Annotations
	if config.Linux != nil && own.Linux != nil {
		config.Linux.CgroupsPath = own.Linux.CgroupsPath
	}
	return config, nil
}

// goOnFrom raises the walls with what is in the snapshot behind them, and lets its processes go on as those of this workload.
func (e *entry) goOnFrom(ctx context.Context, s *snapshotRecord, config *specs.Spec) (_ *run, err error) {
	defer phase.Begin(e.id, "restore")()
	restorer, ok := e.runtime().(runtime.Restorer)
	if !ok {
		return nil, spec.Errorf(spec.KindUnsupported, "%s isolation cannot go on from snapshots", e.isolation())
	}
	rec, _, _ := e.peek()
	inst, err := restorer.Restore(ctx, spec.Sandbox{
		ID: e.id, ImagePath: e.imagePath(), Resources: rec.Spec.Resources, Network: rec.Spec.Network, ConsolePath: e.consolePath(),
		TemplateScope: e.m.cfg.Templates.scope(rec.Caller, rec.Labels), Snapshots: true,
	}, e.m.snapshots.data(s))
	if err != nil {
		return nil, err
	}
	fault.At("restore", "sandbox stands")
	r := &run{inst: inst, client: agent.New(inst.Dial, inst.Done())}
	defer func() {
		if err != nil {
			e.setRun(nil)
			r.client.Close()
		}
	}()
	e.setRun(r)
	r.proc = r.client.Process(runProcess(s.Run))
	claims, err := r.client.Rename(ctx, config.Hostname, e.id)
	if err != nil {
		return nil, err
	}
	fault.At("restore", "renamed")
	if err := r.client.Freeze(ctx, false); err != nil {
		return nil, err
	}
	fault.At("restore", "thawed")
	// Nobody here asked for what callers had exec'd, and nobody would read what it says. Not before: one that was just being forked
	// may have the agent wait for it.
	if err := r.client.Retain(ctx, r.proc.ID); err != nil {
		return nil, err
	}
	encoded, err := json.Marshal(config)
	if err != nil {
		return nil, fmt.Errorf("cannot encode the OCI config: %w", err)
	}
	return r, e.setState(StateRunning, func(r *record) {
		r.config, r.Restoring = encoded, false
		setFacts(r, inst.Facts())
		r.Status.Claims = claims
		r.Status.StartedAt = time.Now().UTC()
	})
}

// imagePath is empty for an image that is gone, which a runtime refuses.
func (e *entry) imagePath() string {
	img, err := e.m.cfg.Images.Get(e.digest)
	if err != nil {
		return ""
	}
	return img.Path
}

// settleSnapshots has a workload go on over which a daemon died while it took a snapshot, and removes what there is of that.
func (e *entry) settleSnapshots(ctx context.Context, r *run) error {
	interrupted := e.m.snapshots.interruptedOf(e.id)
	if len(interrupted) == 0 {
		return nil
	}
	if inst, ok := r.inst.(runtime.Snapshotter); ok {
		if err := inst.GoOn(ctx); err != nil {
			return err
		}
		if err := r.client.Freeze(ctx, false); err != nil {
			return err
		}
	}
	var errs []error
	for _, s := range interrupted {
		errs = append(errs, e.m.snapshots.drop(s))
	}
	return errors.Join(errs...)
}

// sweepSnapshots removes what daemons that died left of snapshots, but those whose workload still has to be let go on.
func (m *Manager) sweepSnapshots() {
	m.snapshots.mu.Lock()
	var left []*snapshotRecord
	for _, s := range m.snapshots.interrupted {
		left = append(left, s)
	}
	m.snapshots.mu.Unlock()
	for _, s := range left {
		m.mu.Lock()
		e := m.byID[s.WorkloadID]
		m.mu.Unlock()
		if e != nil {
			if rec, _, _ := e.peek(); holds(rec.Status.State) {
				continue
			}
		}
		if err := m.snapshots.drop(s); err != nil {
			m.cfg.Log.Error("cannot remove half a snapshot", zap.String("snapshot", s.ID), zap.Error(err))
		}
	}
}
