package server

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

func (s *workloadService) UpdateWorkload(ctx context.Context, r *sandboxdv1.UpdateWorkloadRequest) (*sandboxdv1.UpdateWorkloadResponse, error) {
	change, err := resourceChange(r)
	if err != nil {
		return nil, err
	}
	caller, _ := callerOf(ctx)
	w, err := s.Workloads.Update(ctx, r.GetId(), caller, change)
	if err != nil {
		return nil, err
	}
	return &sandboxdv1.UpdateWorkloadResponse{Workload: workloadToAPI(w)}, nil
}

// resourceChange is what a request makes of resources: the fields its mask names, or those that are set.
func resourceChange(r *sandboxdv1.UpdateWorkloadRequest) (func(*spec.Resources), error) {
	changed, err := changedFields(r)
	if err != nil {
		return nil, err
	}
	if len(changed) == 0 {
		return nil, spec.Invalidf("resources", "nothing to change: set fields of resources, or name them in update_mask")
	}
	from := proto.Clone(r.GetResources()).ProtoReflect() // the change may be made after the call
	return func(res *spec.Resources) {
		to := resourcesToAPI(*res)
		for _, f := range changed {
			if from.Has(f) {
				to.ProtoReflect().Set(f, from.Get(f))
			} else {
				to.ProtoReflect().Clear(f)
			}
		}
		*res = resourcesFromAPI(to)
	}, nil
}

// changedFields are those of resources that a request changes, if only to their default.
func changedFields(r *sandboxdv1.UpdateWorkloadRequest) ([]protoreflect.FieldDescriptor, error) {
	from := r.GetResources().ProtoReflect()
	var changed []protoreflect.FieldDescriptor
	if r.GetUpdateMask() == nil {
		from.Range(func(f protoreflect.FieldDescriptor, _ protoreflect.Value) bool {
			changed = append(changed, f)
			return true
		})
	}
	for i, path := range r.GetUpdateMask().GetPaths() {
		f := from.Descriptor().Fields().ByName(protoreflect.Name(path))
		if f == nil {
			return nil, spec.Invalidf(fmt.Sprintf("update_mask.paths[%d]", i), "%q is no field of Resources", path)
		}
		changed = append(changed, f)
	}
	return changed, nil
}

func (s *workloadService) PauseWorkload(ctx context.Context, r *sandboxdv1.PauseWorkloadRequest) (*sandboxdv1.PauseWorkloadResponse, error) {
	w, err := s.Workloads.Pause(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	return &sandboxdv1.PauseWorkloadResponse{Workload: workloadToAPI(w)}, nil
}

func (s *workloadService) ResumeWorkload(ctx context.Context, r *sandboxdv1.ResumeWorkloadRequest) (*sandboxdv1.ResumeWorkloadResponse, error) {
	w, err := s.Workloads.Resume(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	return &sandboxdv1.ResumeWorkloadResponse{Workload: workloadToAPI(w)}, nil
}
