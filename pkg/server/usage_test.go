package server

import (
	"context"
	"errors"
	"slices"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// One call for all that run: in order, without those that ended meanwhile; waiting for agents is bounded for all together.
func TestListUsage(t *testing.T) {
	var asked workload.Filter
	var failure error
	f := &fakeWorkloads{
		list: func(f workload.Filter, size int, token string) ([]workload.Workload, string, error) {
			asked = f
			if size != 5 || token != "here" {
				t.Errorf("size %d, token %q", size, token)
			}
			return []workload.Workload{{ID: "one"}, {ID: "gone"}, {ID: "ended"}, {ID: "two"}}, "next", nil
		},
		usage: func(ctx context.Context, id string) (workload.Usage, error) {
			if _, ok := ctx.Deadline(); !ok {
				t.Error("nothing bounds the wait for agents")
			}
			switch id {
			case "gone":
				return workload.Usage{}, spec.Errorf(spec.KindNotFound, "gone")
			case "ended":
				return workload.Usage{}, spec.Errorf(spec.KindWrongState, "ended")
			}
			return workload.Usage{Workload: workload.Workload{ID: id}}, failure
		},
	}
	h := serve(t, Config{Workloads: f})
	request := &sandboxdv1.ListUsageRequest{
		Labels: map[string]string{"tenant": "a"}, Isolation: sandboxdv1.Isolation_ISOLATION_VM, PageSize: 5, PageToken: "here",
	}
	answer, err := h.workloads.ListUsage(t.Context(), request)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, u := range answer.GetUsages() {
		ids = append(ids, u.GetId())
	}
	if !slices.Equal(ids, []string{"one", "two"}) || answer.GetNextPageToken() != "next" {
		t.Errorf("usages of %q, next %q", ids, answer.GetNextPageToken())
	}
	if asked.Labels["tenant"] != "a" || asked.Isolation != spec.IsolationVM || asked.Visible == nil ||
		!slices.Equal(asked.States, []workload.State{workload.StateRunning, workload.StatePaused}) {
		t.Errorf("asked for %+v", asked)
	}
	// What cannot be counted is told, not left out.
	failure = errors.New("no cgroup")
	if _, err := h.workloads.ListUsage(t.Context(), request); status.Code(err) != codes.Internal {
		t.Errorf("%v, want the failure", err)
	}
	request.Isolation = sandboxdv1.Isolation_ISOLATION_AUTO
	if _, err := h.workloads.ListUsage(t.Context(), request); status.Code(err) != codes.InvalidArgument {
		t.Errorf("isolation auto: %v", err)
	}
}
