package server

import (
	"context"
	"maps"
	"time"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/durationpb"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/access"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

type snapshotService struct {
	sandboxdv1.UnsafeSnapshotServiceServer
	*Server
}

func (s *snapshotService) CreateSnapshot(ctx context.Context, r *sandboxdv1.CreateSnapshotRequest) (*sandboxdv1.CreateSnapshotResponse, error) {
	made, err := s.Workloads.CreateSnapshot(ctx, r.GetId(), workload.CreateSnapshotOptions{Name: r.GetName()})
	if err != nil {
		return nil, createError(ctx, r.GetName(), err)
	}
	return &sandboxdv1.CreateSnapshotResponse{Snapshot: snapshotToAPI(made)}, nil
}

func (s *snapshotService) ListSnapshots(ctx context.Context, _ *sandboxdv1.ListSnapshotsRequest) (*sandboxdv1.ListSnapshotsResponse, error) {
	permit := permitOf(ctx)
	answer := &sandboxdv1.ListSnapshotsResponse{}
	for _, one := range s.Workloads.Snapshots(func(one workload.Snapshot) bool { return permit.lists(one.Labels, one.Owner) }) {
		answer.Snapshots = append(answer.Snapshots, snapshotToAPI(one))
	}
	return answer, nil
}

func (s *snapshotService) DeleteSnapshot(_ context.Context, r *sandboxdv1.DeleteSnapshotRequest) (*sandboxdv1.DeleteSnapshotResponse, error) {
	if err := s.Workloads.DeleteSnapshot(r.GetSnapshot()); err != nil {
		return nil, err
	}
	return &sandboxdv1.DeleteSnapshotResponse{}, nil
}

func (s *snapshotService) RestoreSnapshot(ctx context.Context, r *sandboxdv1.RestoreSnapshotRequest) (*sandboxdv1.RestoreSnapshotResponse, error) {
	of, asked, err := s.Workloads.Snapshot(r.GetSnapshot())
	if err != nil {
		return nil, err
	}
	if err := s.mayMake(ctx, of.Labels, r.GetLabels(), of.AskedSpec(asked), of.Owner); err != nil {
		return nil, err
	}
	began := time.Now()
	// By its id: the name may be another's by now.
	w, err := s.Workloads.RestoreSnapshot(ctx, of.ID, restoreOptions(ctx, r))
	s.countStart(err, began)
	if err != nil {
		return nil, createError(ctx, r.GetName(), err)
	}
	return &sandboxdv1.RestoreSnapshotResponse{Workload: workloadToAPI(w)}, nil
}

func (s *snapshotService) ForkWorkload(ctx context.Context, r *sandboxdv1.ForkWorkloadRequest) (*sandboxdv1.ForkWorkloadResponse, error) {
	of, err := s.Workloads.Get(r.GetId())
	if err != nil {
		return nil, err
	}
	if err := s.mayMake(ctx, of.Labels, r.GetLabels(), of.Spec, of.Owner); err != nil {
		return nil, err
	}
	began := time.Now()
	w, err := s.Workloads.Fork(ctx, of.ID, restoreOptions(ctx, r))
	s.countStart(err, began)
	if err != nil {
		return nil, createError(ctx, r.GetName(), err)
	}
	return &sandboxdv1.ForkWorkloadResponse{Workload: workloadToAPI(w)}, nil
}

// ownParts is what a workload that goes on from a snapshot has of its own.
type ownParts interface {
	GetName() string
	GetLabels() map[string]string
	GetHostname() string
	GetIdempotencyKey() string
}

func restoreOptions(ctx context.Context, r ownParts) workload.RestoreOptions {
	caller, _ := callerOf(ctx)
	return workload.RestoreOptions{Name: r.GetName(), Labels: r.GetLabels(), Hostname: r.GetHostname(), Key: r.GetIdempotencyKey(), Caller: caller}
}

func (s *snapshotService) countStart(err error, began time.Time) {
	if s.Metrics != nil {
		s.Metrics.Start(spec.IsolationVM, err, time.Since(began))
	}
}

// mayMake refuses a workload that the caller could not have created: the role that selects what it is made of must allow the
// labels and the spec that it will have.
func (s *Server) mayMake(ctx context.Context, labels, more map[string]string, w spec.Workload, owner spec.Caller) error {
	p := permitOf(ctx)
	if p.everything() != nil {
		return nil
	}
	all := maps.Clone(labels)
	if all == nil {
		all = map[string]string{}
	}
	maps.Copy(all, more)
	request := (&sandboxdv1.CreateWorkloadRequest{Labels: all, Spec: specToAPI(w)}).ProtoReflect()
	why, rule := "no role selects what it is made of", ""
	for _, r := range p.roles {
		if !r.Selects(labels, owner, p.caller) {
			continue
		}
		if why = s.refusal(r, request); why == "" {
			return nil
		}
		rule = r.Name
	}
	return forbidden(rule, "%s may not make such a workload: %s", who(p.caller), why)
}

// rolesOnSnapshot are the roles that select the snapshot which m names, whose full id takes the name's place.
func (s *Server) rolesOnSnapshot(p *permit, row row, m proto.Message) ([]*access.Role, error) {
	in := m.ProtoReflect()
	field := in.Descriptor().Fields().ByName("snapshot")
	ref := in.Get(field).String()
	one, _, err := s.Workloads.Snapshot(ref)
	if err != nil || !p.sees(one.Labels, one.Owner) {
		// As with workloads.
		return nil, workload.SnapshotNotFound(ref)
	}
	in.Set(field, protoreflect.ValueOfString(one.ID))
	return p.selecting(row, one.Labels, one.Owner)
}

func snapshotToAPI(one workload.Snapshot) *sandboxdv1.Snapshot {
	return &sandboxdv1.Snapshot{
		Id: one.ID, Name: one.Name, WorkloadId: one.WorkloadID, WorkloadName: one.WorkloadName, Labels: one.Labels, ImageDigest: one.ImageDigest,
		CreatedAt: timeToAPI(one.CreatedAt), MemoryBytes: one.MemoryBytes, DiskBytes: one.DiskBytes, Pause: durationpb.New(one.Pause),
	}
}
