package workload

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Snapshot is a running workload as it was at one moment, its processes included: a copy, safe to keep.
//
//	(no record) ─ CreateSnapshot ─▶ being made ─▶ ready ─ DeleteSnapshot ─▶ (no record)
//	                                    └── fails, or the daemon dies ──────▶ (no record)
type Snapshot struct {
	ID   string `json:"id"`
	Name string `json:"name"`
	// Of the workload that it was taken of, which may be gone. Labels and Owner say whose the secrets in its memory are.
	WorkloadID   string            `json:"workloadID"`
	WorkloadName string            `json:"workloadName"`
	Labels       map[string]string `json:"labels,omitempty"`
	Owner        spec.Caller       `json:"owner"`
	Spec         spec.Workload     `json:"spec"`
	ImageDigest  string            `json:"imageDigest"`
	CreatedAt    time.Time         `json:"createdAt"`
	// What they take on the disk.
	MemoryBytes uint64 `json:"memoryBytes"`
	DiskBytes   uint64 `json:"diskBytes"`
	// How long the workload's processes stood still for it.
	Pause time.Duration `json:"pause"`
}

// SnapshotLimits bound what snapshots may take together; a zero is no bound.
type SnapshotLimits struct {
	Max   int
	Bytes uint64
}

// ReasonAdmissionSnapshots: there are as many snapshots as there may be, or they take as much.
const ReasonAdmissionSnapshots = "ADMISSION_SNAPSHOTS"

// AskedSpec is the spec as it was asked for, without what it defaults to: what a policy and a role decide about.
func (s Snapshot) AskedSpec(asked spec.Resources) spec.Workload {
	w := s.Spec
	w.Resources = asked
	return w
}

// CreateSnapshotOptions are what a caller asks for.
type CreateSnapshotOptions struct {
	// Empty for the beginning of its id.
	Name string
	// Of a fork, which is done with it: it is shown to nobody.
	transient bool
}

// CreateSnapshot takes a snapshot of a running workload, which goes on whatever becomes of it.
func (m *Manager) CreateSnapshot(ctx context.Context, ref string, o CreateSnapshotOptions) (Snapshot, error) {
	e, err := m.find(ref)
	if err != nil {
		return Snapshot{}, err
	}
	s, err := m.takeSnapshot(ctx, e, o)
	if err != nil {
		return Snapshot{}, err
	}
	m.snapshots.release(s)
	return s.Snapshot, nil
}

// takeSnapshot answers with a snapshot that is held.
func (m *Manager) takeSnapshot(ctx context.Context, e *entry, o CreateSnapshotOptions) (*snapshotRecord, error) {
	r, err := e.running()
	if err != nil {
		return nil, err
	}
	inst, ok := r.inst.(runtime.Snapshotter)
	if !ok {
		return nil, spec.Errorf(spec.KindUnsupported, "cannot take a snapshot of workload %q: %s isolation has none, its processes are the host kernel's; create it with --isolation vm --snapshots", e.name, e.isolation())
	}
	if err := inst.CheckSnapshot(); err != nil {
		return nil, err
	}
	if err := m.roomForSnapshot(inst); err != nil {
		return nil, err
	}
	id, err := newID()
	if err != nil {
		return nil, err
	}
	rec, _, _ := e.peek()
	config, err := m.store.config(e.id)
	if err != nil {
		return nil, err
	}
	s := &snapshotRecord{
		Snapshot: Snapshot{
			ID: id, Name: cmp.Or(o.Name, id[:12]), WorkloadID: e.id, WorkloadName: e.name, Labels: maps.Clone(rec.Labels), Owner: rec.Caller,
			Spec: rec.Spec, ImageDigest: e.digest, CreatedAt: time.Now().UTC(),
		},
		Asked: rec.Asked, Run: rec.Run, Transient: o.transient, Config: config,
	}
	if err := m.snapshots.begin(s); err != nil {
		return nil, err
	}
	fault.At("snapshot", "recorded")
	// The daemon's end calls it off too, and waits until the workload goes on.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(m.ctx, cancel)()
	result := make(chan error, 1)
	m.owned.Go(func() { result <- e.snapshot(ctx, r, inst, s) })
	err = <-result
	if err == nil {
		fault.At("snapshot", "taken")
		err = m.snapshots.finish(s)
		fault.At("snapshot", "ready")
	}
	if err != nil {
		return nil, errors.Join(err, m.snapshots.drop(s))
	}
	return s, nil
}

// snapshot takes one of a run. It is neither paused nor resumed meanwhile, nor is its end looked at.
func (e *entry) snapshot(ctx context.Context, r *run, inst runtime.Snapshotter, s *snapshotRecord) error {
	defer phase.Begin(e.id, "snapshot")()
	r.stillMu.Lock()
	defer r.stillMu.Unlock()
	e.mu.Lock()
	runs := e.inState(r, StateRunning)(e.rec)
	e.mu.Unlock()
	if r.ended || !runs {
		return e.wrongState("running")
	}
	var began time.Time
	taken, err := inst.Snapshot(ctx, e.m.snapshots.data(s), runtime.SnapshotHooks{
		Freeze: func(ctx context.Context) error {
			began = time.Now()
			defer r.client.Suspend()
			return r.client.Freeze(ctx, true)
		},
		Stopped: func() (err error) {
			s.Output, err = e.outputSoFar()
			return err
		},
		Thaw: func(ctx context.Context) error {
			r.client.Resume()
			if err := r.client.Freeze(ctx, false); err != nil {
				return fmt.Errorf("cannot let the workload's processes go on: %w", err)
			}
			s.Pause = time.Since(began)
			return nil
		},
	})
	s.MemoryBytes, s.DiskBytes = taken.MemoryBytes, taken.DiskBytes
	return err
}

// outputSoFar is how much of the process's output has come, as its agent counts: all of what it let go of, and perhaps more.
func (e *entry) outputSoFar() (uint64, error) {
	log, err := e.output()
	if err != nil {
		return 0, err
	}
	end, _ := log.end()
	rec, _, _ := e.peek()
	return end.offset - rec.LogBase + rec.OutputBefore, nil
}

// roomForSnapshot refuses what there is no room for, supposing that all of the guest's memory counts.
func (m *Manager) roomForSnapshot(inst runtime.Snapshotter) error {
	usage, err := inst.Usage()
	if err != nil {
		return err
	}
	need := usage.MemoryLimitBytes + usage.DiskBytes
	count, held := m.snapshots.size()
	if most := m.cfg.Snapshots.Max; most > 0 && count >= most {
		return spec.Errorf(spec.KindExhausted, "there are %d snapshots, and may be %d: remove some that are not needed (`sandboxctl snapshot rm`)", count, most).WithReason(ReasonAdmissionSnapshots)
	}
	if most := m.cfg.Snapshots.Bytes; most > 0 && held+need > most {
		return spec.Errorf(spec.KindExhausted, "snapshots take %d MiB, this one may take %d, and all together may take %d: remove some that are not needed (`sandboxctl snapshot rm`)", held>>20, need>>20, most>>20).WithReason(ReasonAdmissionSnapshots)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(m.dir, &st); err != nil {
		return fmt.Errorf("cannot look at the disk: %w", err)
	}
	if free := st.Bavail * uint64(st.Bsize); free < need+m.cfg.Admission.DiskFreeBytes {
		return spec.Errorf(spec.KindExhausted, "the disk has %d MiB left, and a snapshot may take %d of which %d must stay free: remove workloads, snapshots or images that are not needed", free>>20, need>>20, m.cfg.Admission.DiskFreeBytes>>20).WithReason(ReasonAdmissionDisk)
	}
	return nil
}

// Snapshots lists those that visible accepts, the oldest first; nil for all.
func (m *Manager) Snapshots(visible func(Snapshot) bool) []Snapshot { return m.snapshots.list(visible) }

// Snapshot finds one by id, the beginning of it, or name, and answers with the resources that were asked for besides.
func (m *Manager) Snapshot(ref string) (Snapshot, spec.Resources, error) {
	s, err := m.snapshots.hold(ref)
	if err != nil {
		return Snapshot{}, spec.Resources{}, err
	}
	defer m.snapshots.release(s)
	return s.Snapshot, s.Asked, nil
}

// DeleteSnapshot removes one. What went on from it does not need it.
func (m *Manager) DeleteSnapshot(ref string) error { return m.snapshots.delete(ref) }

// SnapshotNotFound is what a ref that names no snapshot is answered with, and one that names one its caller may not see.
func SnapshotNotFound(ref string) error {
	return spec.Errorf(spec.KindNotFound, "no snapshot %q: `sandboxctl snapshot ls` lists them", ref)
}

// parseSnapshotRecord reads a record.
func parseSnapshotRecord(b []byte) (*snapshotRecord, error) {
	s := &snapshotRecord{}
	if err := json.Unmarshal(b, s); err != nil {
		return nil, err
	}
	if !snapshotID.MatchString(s.ID) || !snapshotID.MatchString(s.WorkloadID) || s.Run < 1 {
		return nil, errors.New("it names no snapshot")
	}
	return s, nil
}
