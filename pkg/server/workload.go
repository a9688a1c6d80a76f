package server

import (
	"context"
	"time"

	"google.golang.org/protobuf/proto"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

const (
	// defaultStopGrace is what StopWorkload's grace is when absent, as the API says.
	defaultStopGrace = 10 * time.Second
	// defaultPage is how many workloads or images an answer has when the request does not say.
	defaultPage = 100
	// maxListBytes bounds an answer of many workloads: specs may carry big environments, and a client accepts only so
	// much in one message (pkg/client: 64 MiB). One workload fits in any case: its request was at most maxRequestBytes.
	maxListBytes = 16 << 20
)

type workloadService struct {
	sandboxdv1.UnsafeWorkloadServiceServer
	*Server
}

// createOptions is what a request asks for, from whom the kernel says it comes.
func createOptions(ctx context.Context, name string, labels map[string]string, w *sandboxdv1.WorkloadSpec) (workload.CreateOptions, error) {
	if err := checkArgs("spec.process.entrypoint", w.GetProcess().GetEntrypoint()); err != nil {
		return workload.CreateOptions{}, err
	}
	if err := checkArgs("spec.process.command", w.GetProcess().GetCommand()); err != nil {
		return workload.CreateOptions{}, err
	}
	caller, _ := callerOf(ctx)
	return workload.CreateOptions{Name: name, Labels: labels, Spec: specFromAPI(w), Caller: caller}, nil
}

func (s *workloadService) CreateWorkload(ctx context.Context, r *sandboxdv1.CreateWorkloadRequest) (*sandboxdv1.CreateWorkloadResponse, error) {
	o, err := createOptions(ctx, r.GetName(), r.GetLabels(), r.GetSpec())
	if err != nil {
		return nil, err
	}
	o.Key = r.GetIdempotencyKey()
	w, err := s.Workloads.Create(ctx, o)
	if err != nil {
		return nil, createError(ctx, r.GetName(), err)
	}
	return &sandboxdv1.CreateWorkloadResponse{Workload: workloadToAPI(w)}, nil
}

// createError is what a caller is told of why a workload could not be created.
func createError(ctx context.Context, name string, err error) error {
	if spec.KindOf(err) == spec.KindAlreadyExists && permitOf(ctx).everything() == nil {
		// Whose name it is may not be the caller's business.
		return spec.Errorf(spec.KindAlreadyExists, "the name %q is taken: choose another", name)
	}
	return err
}

func (s *workloadService) StartWorkload(ctx context.Context, r *sandboxdv1.StartWorkloadRequest) (*sandboxdv1.StartWorkloadResponse, error) {
	began := time.Now()
	w, err := s.Workloads.Start(ctx, r.GetId())
	if s.Metrics != nil {
		s.Metrics.Start(s.isolationOf(w, r.GetId()), err, time.Since(began))
	}
	if err != nil {
		return nil, err
	}
	return &sandboxdv1.StartWorkloadResponse{Workload: workloadToAPI(w)}, nil
}

// isolationOf is that of a workload, also when a call on it failed.
func (s *workloadService) isolationOf(w workload.Workload, ref string) spec.Isolation {
	if w.ID == "" {
		w, _ = s.Workloads.Get(ref)
	}
	return w.Status.Isolation
}

func (s *workloadService) GetWorkload(_ context.Context, r *sandboxdv1.GetWorkloadRequest) (*sandboxdv1.GetWorkloadResponse, error) {
	w, err := s.Workloads.Get(r.GetId())
	if err != nil {
		return nil, err
	}
	return &sandboxdv1.GetWorkloadResponse{Workload: workloadToAPI(w)}, nil
}

func (s *workloadService) ListWorkloads(ctx context.Context, r *sandboxdv1.ListWorkloadsRequest) (*sandboxdv1.ListWorkloadsResponse, error) {
	f, err := filterOf(ctx, r.GetLabels(), r.GetIsolation())
	if err != nil {
		return nil, err
	}
	for _, state := range r.GetStates() {
		ours := states.fromAPI(state)
		if ours == "" {
			return nil, spec.Invalidf("states", "states contains %s, which no workload can be in", state)
		}
		f.States = append(f.States, ours)
	}
	for size := pageSize(r.GetPageSize()); ; size /= 2 {
		list, next, err := s.Workloads.List(f, size, r.GetPageToken())
		if err != nil {
			return nil, err
		}
		answer := &sandboxdv1.ListWorkloadsResponse{NextPageToken: next}
		for _, w := range list {
			answer.Workloads = append(answer.Workloads, workloadToAPI(w))
		}
		if size == 1 || proto.Size(answer) <= maxListBytes {
			return answer, nil
		}
	}
}

// filterOf selects workloads that the caller may see, with these labels, and of this isolation if it is not 0.
func filterOf(ctx context.Context, labels map[string]string, isolation sandboxdv1.Isolation) (workload.Filter, error) {
	permit := permitOf(ctx)
	f := workload.Filter{
		Labels: labels, Isolation: isolations.fromAPI(isolation),
		Visible: func(w workload.Workload) bool { return permit.lists(w.Labels, w.Owner) },
	}
	if f.Isolation == spec.IsolationAuto || (f.Isolation == "" && isolation != 0) {
		return f, spec.Invalidf("isolation", "isolation must be container or vm: no workload runs as %s", isolation)
	}
	return f, nil
}

// pageSize is the page a request asks for; validation bounds it.
func pageSize(asked uint32) int {
	if asked == 0 {
		return defaultPage
	}
	return int(asked)
}

func (s *workloadService) StopWorkload(ctx context.Context, r *sandboxdv1.StopWorkloadRequest) (*sandboxdv1.StopWorkloadResponse, error) {
	grace := defaultStopGrace
	if r.GetGrace() != nil {
		grace = r.GetGrace().AsDuration()
	}
	w, err := s.Workloads.Stop(ctx, r.GetId(), grace)
	if err != nil {
		return nil, err
	}
	return &sandboxdv1.StopWorkloadResponse{Workload: workloadToAPI(w)}, nil
}

func (s *workloadService) KillWorkload(ctx context.Context, r *sandboxdv1.KillWorkloadRequest) (*sandboxdv1.KillWorkloadResponse, error) {
	if err := s.Workloads.Kill(ctx, r.GetId(), r.GetSignal()); err != nil {
		return nil, err
	}
	return &sandboxdv1.KillWorkloadResponse{}, nil
}

func (s *workloadService) WaitWorkload(ctx context.Context, r *sandboxdv1.WaitWorkloadRequest) (*sandboxdv1.WaitWorkloadResponse, error) {
	w, err := s.Workloads.Wait(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	return &sandboxdv1.WaitWorkloadResponse{Workload: workloadToAPI(w)}, nil
}

func (s *workloadService) DeleteWorkload(ctx context.Context, r *sandboxdv1.DeleteWorkloadRequest) (*sandboxdv1.DeleteWorkloadResponse, error) {
	if err := s.Workloads.Delete(ctx, r.GetId(), r.GetForce()); err != nil {
		return nil, err
	}
	return &sandboxdv1.DeleteWorkloadResponse{}, nil
}

func (s *workloadService) GetOCIConfig(ctx context.Context, r *sandboxdv1.GetOCIConfigRequest) (*sandboxdv1.GetOCIConfigResponse, error) {
	config, err := s.Workloads.OCIConfig(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	return &sandboxdv1.GetOCIConfigResponse{Config: config}, nil
}
