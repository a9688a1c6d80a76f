package e2e

import (
	"context"
	"io"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

var isolationOf = map[string]sandboxdv1.Isolation{
	"container": sandboxdv1.Isolation_ISOLATION_CONTAINER, "vm": sandboxdv1.Isolation_ISOLATION_VM,
}

// runWorkload makes the call and answers with all that came, and with how the call ended.
func runWorkload(ctx context.Context, t *testing.T, d *harness.Daemon, r *sandboxdv1.RunWorkloadRequest) (events []sandboxdv1.RunEvent, last *sandboxdv1.Workload, err error) {
	t.Helper()
	s, err := d.Workloads().RunWorkload(ctx, r)
	must(t, err)
	for {
		answer, err := s.Recv()
		if err == io.EOF {
			return events, last, nil
		}
		if err != nil {
			return events, last, err
		}
		events, last = append(events, answer.GetEvent()), answer.GetWorkload()
	}
}

// One call is a workload's whole life, behind either wall; its caller may leave, and what he asked for is done all the same.
func TestRunWorkload(t *testing.T) {
	harness.Both(t, shared, func(t *testing.T, w harness.Wall) {
		d := w.Daemon
		ctx, cancel := context.WithTimeout(t.Context(), harness.CallTimeout)
		defer cancel()
		request := func(script string) *sandboxdv1.RunWorkloadRequest {
			return &sandboxdv1.RunWorkloadRequest{
				RemoveWhenEnded: true,
				Spec: &sandboxdv1.WorkloadSpec{
					Image: busybox, Isolation: isolationOf[w.Isolation], Process: &sandboxdv1.ProcessSpec{Command: []string{"/bin/sh", "-c", script}},
				},
			}
		}
		events, last, err := runWorkload(ctx, t, d, request("exit 7"))
		must(t, err)
		if !slices.Equal(events, []sandboxdv1.RunEvent{sandboxdv1.RunEvent_RUN_EVENT_REMOVED}) || last.GetStatus().GetExitCode() != 7 {
			t.Errorf("answers %v, the last of %v", events, last)
		}
		if _, err := d.Workloads().GetWorkload(ctx, &sandboxdv1.GetWorkloadRequest{Id: last.GetId()}); status.Code(err) != codes.NotFound {
			t.Errorf("it is there yet: %v", err)
		}

		r := request("exit 0")
		r.RemoveWhenEnded, r.Progress = false, true
		events, last, err = runWorkload(ctx, t, d, r)
		must(t, err)
		if want := []sandboxdv1.RunEvent{sandboxdv1.RunEvent_RUN_EVENT_CREATED, sandboxdv1.RunEvent_RUN_EVENT_STARTED, sandboxdv1.RunEvent_RUN_EVENT_ENDED}; !slices.Equal(events, want) {
			t.Errorf("with progress: %v", events)
		}
		d.Call(t, "rm", last.GetId())

		// Whoever leaves when it runs has it removed when it ends.
		r = request("sleep 1000")
		r.Progress = true
		leaving, leave := context.WithCancel(ctx)
		defer leave()
		s, err := d.Workloads().RunWorkload(leaving, r)
		must(t, err)
		id := ""
		for {
			answer, err := s.Recv()
			must(t, err)
			if id = answer.GetWorkload().GetId(); answer.GetEvent() == sandboxdv1.RunEvent_RUN_EVENT_STARTED {
				break
			}
		}
		leave()
		if state := d.Inspect(t, id).Status.State; state != "WORKLOAD_STATE_RUNNING" {
			t.Errorf("its caller has left, and it is %s", state)
		}
		d.Call(t, "kill", id)
		harness.Eventually(t, harness.CallTimeout, "it is removed", func() (bool, string) {
			_, err := d.Workloads().GetWorkload(ctx, &sandboxdv1.GetWorkloadRequest{Id: id})
			return status.Code(err) == codes.NotFound, status.Code(err).String()
		})

		// As people ask for it.
		id = strings.TrimSpace(d.Call(t, "run", "-d", "--rm", "--isolation", w.Isolation, busybox, "sleep", "1000").Stdout)
		if state := d.Inspect(t, id).Status.State; state != "WORKLOAD_STATE_RUNNING" {
			t.Errorf("run -d --rm: it is %s", state)
		}
		d.Call(t, "stop", "--grace", "1s", id)
		harness.Eventually(t, harness.CallTimeout, "it is removed", func() (bool, string) {
			_, err := d.Workloads().GetWorkload(ctx, &sandboxdv1.GetWorkloadRequest{Id: id})
			return status.Code(err) == codes.NotFound, status.Code(err).String()
		})

		r = request("exit 0")
		r.Spec.Process.Command = []string{"/nonexistent"}
		created, err := d.Workloads().CreateWorkload(ctx, &sandboxdv1.CreateWorkloadRequest{Spec: r.Spec})
		must(t, err)
		_, asStarted := d.Workloads().StartWorkload(ctx, &sandboxdv1.StartWorkloadRequest{Id: created.GetWorkload().GetId()})
		d.Call(t, "rm", created.GetWorkload().GetId())
		if _, _, err := runWorkload(ctx, t, d, r); err == nil || status.Code(err) != status.Code(asStarted) {
			t.Errorf("a program that is not there: %v, and by a start %v", err, asStarted)
		}
		r.Spec.Image = "nothing"
		if _, _, err := runWorkload(ctx, t, d, r); status.Code(err) != codes.NotFound {
			t.Errorf("an image that is not there: %v", err)
		}
	})
}
