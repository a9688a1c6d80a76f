package server

import (
	"context"
	"time"

	"google.golang.org/grpc"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

var runEvents = pairs[workload.RunEvent, sandboxdv1.RunEvent]{
	{workload.RunCreated, sandboxdv1.RunEvent_RUN_EVENT_CREATED},
	{workload.RunStarted, sandboxdv1.RunEvent_RUN_EVENT_STARTED},
	{workload.RunEnded, sandboxdv1.RunEvent_RUN_EVENT_ENDED},
	{workload.RunRemoved, sandboxdv1.RunEvent_RUN_EVENT_REMOVED},
}

func (s *workloadService) RunWorkload(r *sandboxdv1.RunWorkloadRequest, stream grpc.ServerStreamingServer[sandboxdv1.RunWorkloadResponse]) error {
	ctx := stream.Context()
	o, err := createOptions(ctx, r.GetName(), r.GetLabels(), r.GetSpec())
	if err != nil {
		return err
	}
	o.Key, o.RemoveWhenEnded = r.GetIdempotencyKey(), r.GetRemoveWhenEnded()
	last := workload.RunEnded
	switch {
	case r.GetDetach():
		last = workload.RunStarted
	case o.RemoveWhenEnded:
		last = workload.RunRemoved
	}
	run := workload.RunOptions{CreateOptions: o, Detach: r.GetDetach(), Quiet: !r.GetProgress(), Begin: s.runStep(ctx, r.GetName())}
	return s.Workloads.Run(ctx, run, func(e workload.RunEvent, w workload.Workload) error {
		if !r.GetProgress() && e != last {
			return nil // each answer wakes the caller
		}
		return stream.Send(&sandboxdv1.RunWorkloadResponse{Event: runEvents.toAPI(e), Workload: workloadToAPI(w)})
	})
}

// runStep notes what a run does, as the calls it stands for would be noted. What it does after its caller has gone is the caller's
// all the same.
func (s *workloadService) runStep(ctx context.Context, name string) func(workload.RunEvent) func(string, error) error {
	methods := map[workload.RunEvent]string{
		workload.RunStarted: sandboxdv1.WorkloadService_StartWorkload_FullMethodName,
		workload.RunRemoved: sandboxdv1.WorkloadService_DeleteWorkload_FullMethodName,
	}
	return func(e workload.RunEvent) func(string, error) error {
		began := time.Now()
		return func(id string, err error) error {
			if e == workload.RunCreated {
				if err != nil {
					return createError(ctx, name, err)
				}
				auditOf(ctx).names(id)
			}
			if e == workload.RunStarted && s.Metrics != nil {
				s.Metrics.Start(s.isolationOf(workload.Workload{}, id), err, time.Since(began))
			}
			if method := methods[e]; method != "" {
				auditOf(ctx).step(s.Log, method, id, toStatus(context.Background(), err), time.Since(began))
			}
			return err
		}
	}
}
