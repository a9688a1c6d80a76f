package workload

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"maps"
	"time"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/image"
	"github.com/sandboxd/sandboxd/pkg/oci"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// CreateOptions are what a caller asks for.
type CreateOptions struct {
	Name   string
	Labels map[string]string
	Spec   spec.Workload
	Caller spec.Caller
	// The daemon deletes it when it has ended: Run's, for whoever creates a workload otherwise is there to delete it.
	RemoveWhenEnded bool
	// Not empty: a retry by the same caller with the same key answers with the workload that the first try made.
	Key string

	// Nobody is told of it before it is started: the start's sync is soon enough.
	unsynced bool
	// What it is made of, where it is a snapshot, and what that is to a retry.
	snapshot *snapshotRecord
	from     string
}

// Create records a workload and the policy's decision. It runs nothing.
func (m *Manager) Create(ctx context.Context, o CreateOptions) (Workload, error) {
	if o.Key != "" {
		return m.createOnce(ctx, o)
	}
	return m.create(o, nil)
}

func (m *Manager) create(o CreateOptions, once *once) (Workload, error) {
	id, err := newID()
	if err != nil {
		return Workload{}, err
	}
	ref := o.Spec.Image
	if o.snapshot != nil {
		ref = o.snapshot.ImageDigest // whatever has the name by now
	}
	img, err := m.cfg.Images.Get(ref)
	if err != nil {
		return Workload{}, err
	}
	// On the request as it was made: what is left out is not known to the policy.
	decision, err := m.decide(o, img)
	if err != nil {
		return Workload{}, err
	}
	o.Name = cmp.Or(o.Name, id[:12])
	asked := o.Spec.Resources
	o.Spec.Resources = withDefaults(o.Spec.Resources, m.cfg.Defaults)
	if o.snapshot != nil {
		o.Spec.Resources = o.snapshot.Spec.Resources
	}
	if err := checkSnapshots(o, decision.Granted); err != nil {
		return Workload{}, err
	}
	if err := m.checkLimits(decision.Granted, o.Spec.Resources); err != nil {
		return Workload{}, err
	}
	// Only to learn now, not at the start, what cannot be run.
	if spec.Joins(o.Spec.Network) {
		if err := m.cfg.Networks.Check(o.Spec.Network); err != nil {
			return Workload{}, err
		}
	}
	if _, err := oci.Config(id, o.Spec, img.Config, decision.Granted); err != nil {
		return Workload{}, err
	}
	e := newEntry(m, &record{
		Workload: Workload{
			ID: id, Name: o.Name, Labels: maps.Clone(o.Labels), Spec: o.Spec, CreatedAt: time.Now().UTC(), RemoveWhenEnded: o.RemoveWhenEnded,
			Status: Status{State: StateCreated, Isolation: decision.Granted, Decision: decision, ImageDigest: img.Digest},
		},
		Asked:  asked,
		Caller: o.Caller,
		Once:   once, Restoring: o.snapshot != nil,
	})
	if err := m.roomOnDisk(); err != nil {
		return Workload{}, err
	}
	if err := m.reserve(e); err != nil {
		return Workload{}, err
	}
	// With the name reserved the image can no longer be removed; before, it may have been.
	if _, err := m.cfg.Images.Get(img.Digest); err != nil {
		m.forget(e)
		return Workload{}, err
	}
	if err := m.record(e, !o.unsynced); err != nil {
		m.forget(e)
		return Workload{}, err
	}
	w := e.workload()
	e.announce(EventCreated, nil)
	m.mu.Lock()
	defer m.mu.Unlock()
	e.ready = true
	return w, nil
}

// checkSnapshots refuses what no snapshot could be taken of later, or what cannot go on from one.
func checkSnapshots(o CreateOptions, granted spec.Isolation) error {
	switch {
	case o.snapshot != nil && granted != spec.IsolationVM:
		return spec.Errorf(spec.KindWrongState, "a snapshot of a VM cannot go on as a %s, which is what is decided for it now", granted)
	case o.Spec.Snapshots && granted != spec.IsolationVM:
		return spec.Errorf(spec.KindUnsupported, "snapshots cannot be taken of a %s, whose processes are the host kernel's: ask for --isolation vm, or leave out --snapshots", granted)
	case o.Spec.Snapshots && spec.Joins(o.Spec.Network):
		return spec.Errorf(spec.KindUnsupported, "snapshots cannot be taken of a VM that is joined to a network, since whatever went on from one would have its address: leave out --network or --snapshots")
	}
	return nil
}

// record writes the record of a new workload. With sync it is on the disk before anyone is told of the workload.
func (m *Manager) record(e *entry, sync bool) error {
	defer phase.Begin(e.id, "record "+string(StateCreated))()
	fault.At("record", "before created")
	change, err := m.store.put(&e.rec)
	if err != nil {
		return err
	}
	fault.At("record", "created written")
	if !sync {
		return nil
	}
	if err = m.store.sync(change); err != nil {
		_, _ = m.store.delete(e.id) // it may be there after all, and nobody knows of it
	}
	fault.At("record", "created synced")
	return err
}

func newID() (string, error) {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return "", fmt.Errorf("cannot draw an id: %w", err)
	}
	return hex.EncodeToString(b[:]), nil
}

// reserve takes the name of a workload whose record is not on the disk yet: nobody else finds it.
func (m *Manager) reserve(e *entry) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if other := m.byName[e.name]; other != nil {
		return spec.Errorf(spec.KindAlreadyExists, "the name %q is taken by workload %s: choose another or remove it with `sandboxctl rm`", e.name, other.id[:12])
	}
	if err := m.admitCallerLocked(e.rec.Caller); err != nil {
		return err
	}
	m.addLocked(e)
	return nil
}

func (m *Manager) decide(o CreateOptions, img image.Image) (policy.Decision, error) {
	return m.cfg.Policy.Decide(policy.Input{
		Request: policy.Request{Image: o.Spec.Image, Labels: o.Labels, Workload: o.Spec, Name: o.Name},
		Image:   policy.Image{Digest: img.Digest, Names: img.Names, Config: img.Config},
		Caller:  o.Caller,
		Host:    m.cfg.Host(),
	})
}

// Explain says what would be decided, and changes nothing. A refusal comes as the Decision together with its error; an
// error without a rule is for requests that cannot be decided at all.
func (m *Manager) Explain(ctx context.Context, o CreateOptions) (policy.Decision, error) {
	img, err := m.cfg.Images.Get(o.Spec.Image)
	if err != nil {
		return policy.Decision{}, err
	}
	return m.decide(o, img)
}
