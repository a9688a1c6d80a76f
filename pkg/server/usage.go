package server

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sync/errgroup"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// usagesAtOnce bounds how many sandboxes one call looks at side by side: each may wait for an agent that does not answer.
const usagesAtOnce = 32

// claimsAltogether bounds how long one call waits for agents, however many of them are silent: after that the host's numbers
// stand alone.
const claimsAltogether = 4 * time.Second

func (s *workloadService) GetUsage(ctx context.Context, r *sandboxdv1.GetUsageRequest) (*sandboxdv1.GetUsageResponse, error) {
	u, err := s.Workloads.Usage(ctx, r.GetId())
	if err != nil {
		return nil, err
	}
	return &sandboxdv1.GetUsageResponse{Usage: usageToAPI(u)}, nil
}

func (s *workloadService) ListUsage(ctx context.Context, r *sandboxdv1.ListUsageRequest) (*sandboxdv1.ListUsageResponse, error) {
	f, err := filterOf(ctx, r.GetLabels(), r.GetIsolation())
	if err != nil {
		return nil, err
	}
	f.States = []workload.State{workload.StateRunning, workload.StatePaused}
	list, next, err := s.Workloads.List(f, pageSize(r.GetPageSize()), r.GetPageToken())
	if err != nil {
		return nil, err
	}
	found := make([]*sandboxdv1.Usage, len(list))
	limited, cancel := context.WithTimeout(ctx, claimsAltogether)
	defer cancel()
	var group errgroup.Group
	group.SetLimit(usagesAtOnce)
	for i, w := range list {
		group.Go(func() error {
			u, err := s.Workloads.Usage(limited, w.ID)
			if endedMeanwhile(err) {
				return nil
			}
			if err == nil {
				found[i] = usageToAPI(u)
			}
			return err
		})
	}
	if err := errors.Join(group.Wait(), context.Cause(ctx)); err != nil {
		return nil, err
	}
	answer := &sandboxdv1.ListUsageResponse{NextPageToken: next}
	for _, u := range found {
		if u != nil {
			answer.Usages = append(answer.Usages, u)
		}
	}
	return answer, nil
}

// endedMeanwhile: between the list and the look.
func endedMeanwhile(err error) bool {
	var e *spec.Error
	return errors.As(err, &e) && (e.Kind == spec.KindNotFound || e.Kind == spec.KindWrongState)
}
