package e2e

import (
	"strings"
	"testing"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/health/grpc_health_v1"
	reflectionv1 "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// Errors carry a code to act on and details that say what about.
func TestErrorsOfTheAPI(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		api := w.Workloads()
		isolation := sandboxdv1.Isolation_ISOLATION_CONTAINER
		if w.Isolation == "vm" {
			isolation = sandboxdv1.Isolation_ISOLATION_VM
		}
		spec := func() *sandboxdv1.WorkloadSpec {
			return &sandboxdv1.WorkloadSpec{Image: busybox, Isolation: isolation, Process: &sandboxdv1.ProcessSpec{Command: []string{"true"}}}
		}
		create := func(edit func(*sandboxdv1.CreateWorkloadRequest)) error {
			r := &sandboxdv1.CreateWorkloadRequest{Spec: spec()}
			edit(r)
			made, err := api.CreateWorkload(t.Context(), r)
			if err == nil {
				_, err := api.DeleteWorkload(t.Context(), &sandboxdv1.DeleteWorkloadRequest{Id: made.Workload.Id, Force: true})
				must(t, err)
			}
			return err
		}
		taken := "taken-" + w.Isolation
		id := w.Create(t, "--name", taken, busybox, "true")

		for _, c := range []struct {
			what string
			err  func() error
			code codes.Code
			// In the message.
			says string
			// Of the request, in the details; for INVALID_ARGUMENT.
			field string
		}{
			{"unknown workload", func() error {
				_, err := api.GetWorkload(t.Context(), &sandboxdv1.GetWorkloadRequest{Id: "ffffffffffffffff"})
				return err
			}, codes.NotFound, "ffffffffffffffff", ""},
			{"unknown image", func() error {
				return create(func(r *sandboxdv1.CreateWorkloadRequest) { r.Spec.Image = "no/such/image" })
			}, codes.NotFound, "no/such/image", ""},
			{"name in use", func() error {
				return create(func(r *sandboxdv1.CreateWorkloadRequest) { r.Name = taken })
			}, codes.AlreadyExists, taken, ""},
			{"exec before start", func() error {
				s, err := api.Exec(t.Context())
				must(t, err)
				must(t, s.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Start{Start: &sandboxdv1.ExecStart{Id: id, Command: []string{"true"}}}}))
				_, err = s.Recv()
				return err
			}, codes.FailedPrecondition, "created", ""},
			{"no isolation", func() error {
				return create(func(r *sandboxdv1.CreateWorkloadRequest) { r.Spec.Isolation = 0 })
			}, codes.InvalidArgument, "", "spec.isolation"},
			{"too little memory", func() error {
				return create(func(r *sandboxdv1.CreateWorkloadRequest) { r.Spec.Resources = &sandboxdv1.Resources{MemoryBytes: 5} })
			}, codes.InvalidArgument, "", "spec.resources.memory_bytes"},
			{"bad name", func() error {
				return create(func(r *sandboxdv1.CreateWorkloadRequest) { r.Name = "-rf" })
			}, codes.InvalidArgument, "", "name"},
			{"no spec", func() error {
				return create(func(r *sandboxdv1.CreateWorkloadRequest) { r.Spec = nil })
			}, codes.InvalidArgument, "", "spec"},
			{"unknown capability", func() error {
				return create(func(r *sandboxdv1.CreateWorkloadRequest) { r.Spec.CapAdd = []string{"CAP_FLY"} })
			}, codes.InvalidArgument, "CAP_FLY", "spec.cap_add"},
			{"unknown rlimit", func() error {
				return create(func(r *sandboxdv1.CreateWorkloadRequest) {
					r.Spec.Process.Rlimits = []*sandboxdv1.Rlimit{{Type: "RLIMIT_SLEEP"}}
				})
			}, codes.InvalidArgument, "RLIMIT_SLEEP", "spec.process.rlimits"},
		} {
			err := c.err()
			s := status.Convert(err)
			if s.Code() != c.code || !strings.Contains(s.Message(), c.says) {
				t.Errorf("%s: got %s %q, want %s that says %q", c.what, s.Code(), s.Message(), c.code, c.says)
			}
			reason, field := details(s)
			if err != nil && reason == "" {
				t.Errorf("%s: no reason in the details %v", c.what, s.Details())
			}
			if !strings.HasPrefix(field, c.field) || c.field == "" && field != "" {
				t.Errorf("%s: field %q in the details, want %q", c.what, field, c.field)
			}
		}
	})
}

func details(s *status.Status) (reason, field string) {
	for _, d := range s.Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			reason = d.Reason
		case *errdetails.BadRequest:
			if len(d.FieldViolations) > 0 {
				field = d.FieldViolations[0].Field
			}
		}
	}
	return reason, field
}

// What is not built yet is refused with a word about it, never ignored.
func TestUnbuiltIsRefused(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		for _, c := range []struct {
			flags []string
			word  string
		}{
			{[]string{"--mount", "type=bind,source=/etc,target=/mnt"}, "bind"},
		} {
			args := append([]string{"run", "--isolation", w.Isolation}, c.flags...)
			w.Command(append(args, busybox, "true")...).Run().WantError(t, 125, c.word)
		}
		if out := w.Call(t, "ps", "-a", "-q").Stdout; out != "" {
			t.Errorf("what was refused left workloads: %s", out)
		}
	})
}

func TestHealthAndReflection(t *testing.T) {
	d := shared
	d.Watch(t)
	for _, service := range []string{"", "sandboxd.v1.WorkloadService"} {
		r, err := grpc_health_v1.NewHealthClient(d.Conn).Check(t.Context(), &grpc_health_v1.HealthCheckRequest{Service: service})
		if err != nil || r.Status != grpc_health_v1.HealthCheckResponse_SERVING {
			t.Errorf("health of %q: %v, %v", service, r, err)
		}
	}
	stream, err := reflectionv1.NewServerReflectionClient(d.Conn).ServerReflectionInfo(t.Context())
	must(t, err)
	must(t, stream.Send(&reflectionv1.ServerReflectionRequest{MessageRequest: &reflectionv1.ServerReflectionRequest_ListServices{}}))
	answer, err := stream.Recv()
	must(t, err)
	must(t, stream.CloseSend())
	var names []string
	for _, s := range answer.GetListServicesResponse().GetService() {
		names = append(names, s.Name)
	}
	for _, want := range []string{"WorkloadService", "ImageService", "PolicyService", "SystemService"} {
		if !strings.Contains(strings.Join(names, " "), "sandboxd.v1."+want) {
			t.Errorf("reflection lists %q, not %s", names, want)
		}
	}
}
