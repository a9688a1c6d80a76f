package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"go.uber.org/zap/zaptest/observer"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	reflectionpb "google.golang.org/grpc/reflection/grpc_reflection_v1"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// callAs is set in a copy of this test program that calls a server as another user: the socket to call.
const callAs = "SANDBOXD_TEST_CALL"

func TestMain(m *testing.M) {
	if socket := os.Getenv(callAs); socket != "" {
		if err := createOnce(socket); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func createOnce(socket string) error {
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	_, err = sandboxdv1.NewWorkloadServiceClient(conn).CreateWorkload(context.Background(), validCreate())
	return err
}

func validCreate() *sandboxdv1.CreateWorkloadRequest {
	return &sandboxdv1.CreateWorkloadRequest{Spec: &sandboxdv1.WorkloadSpec{
		Image: "debian", Isolation: sandboxdv1.Isolation_ISOLATION_AUTO,
	}}
}

// Who calls is what the kernel says, not what a client does.
func TestCallerIsWhatTheKernelSays(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("run this test as root: it calls as another user")
	}
	callers := make(chan spec.Caller, 1)
	h := serve(t, Config{Workloads: &fakeWorkloads{create: func(_ context.Context, o workload.CreateOptions) (workload.Workload, error) {
		callers <- o.Caller
		return workload.Workload{}, nil
	}}})
	// Everybody may open this one, and reach it: Go's directory for the test is 0700.
	if err := errors.Join(os.Chmod(h.socket, 0o666), os.Chmod(filepath.Dir(filepath.Dir(h.socket)), 0o755)); err != nil {
		t.Fatal(err)
	}
	// By descriptor: the other user may not reach the path.
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	cmd := exec.CommandContext(t.Context(), "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{self}
	cmd.Env = []string{callAs + "=" + h.socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 23456, Groups: []uint32{7, 8, 9}}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("call as another user: %v\n%s", err, out)
	}
	got := receive(t, callers, "the call")
	if got.UID != 12345 || got.GID != 23456 || int(got.PID) != cmd.Process.Pid || !slices.Equal(got.GIDs, []uint32{7, 8, 9}) {
		t.Errorf("caller %+v, want uid 12345, gid 23456, groups 7 8 9, pid %d", got, cmd.Process.Pid)
	}
}

// More groups than the first guess has room for.
func TestManyGroups(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("run this test as root: it calls with other groups")
	}
	callers := make(chan spec.Caller, 1)
	h := serve(t, Config{Workloads: &fakeWorkloads{create: func(_ context.Context, o workload.CreateOptions) (workload.Workload, error) {
		callers <- o.Caller
		return workload.Workload{}, nil
	}}})
	want := make([]uint32, 1000)
	for i := range want {
		want[i] = uint32(i + 1)
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Env = []string{callAs + "=" + h.socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Groups: want}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("call with many groups: %v\n%s", err, out)
	}
	if got := receive(t, callers, "the call"); !slices.Equal(got.GIDs, want) {
		t.Errorf("%d groups arrived, want %d", len(got.GIDs), len(want))
	}
}

// detailsOf reads an error as a client does.
func detailsOf(err error) (info *errdetails.ErrorInfo, bad *errdetails.BadRequest) {
	for _, d := range status.Convert(err).Details() {
		switch d := d.(type) {
		case *errdetails.ErrorInfo:
			info = d
		case *errdetails.BadRequest:
			bad = d
		}
	}
	return info, bad
}

func TestKindsBecomeCodes(t *testing.T) {
	for _, c := range []struct {
		err    error
		code   codes.Code
		reason string
	}{
		{errors.New("plain"), codes.Internal, "INTERNAL"},
		{spec.Errorf(spec.KindInternal, "x"), codes.Internal, "INTERNAL"},
		{spec.Errorf(spec.KindNotFound, "x"), codes.NotFound, "NOT_FOUND"},
		{spec.Errorf(spec.KindAlreadyExists, "x"), codes.AlreadyExists, "ALREADY_EXISTS"},
		{spec.Invalidf("spec.image", "x"), codes.InvalidArgument, "INVALID"},
		{spec.Errorf(spec.KindWrongState, "x"), codes.FailedPrecondition, "WRONG_STATE"},
		{spec.Errorf(spec.KindDenied, "x").WithReason(spec.ReasonPolicyDenied), codes.PermissionDenied, "POLICY_DENIED"},
		{spec.Errorf(spec.KindExhausted, "x"), codes.ResourceExhausted, "EXHAUSTED"},
		{spec.Errorf(spec.KindUnavailable, "x"), codes.Unavailable, "UNAVAILABLE"},
		{spec.Errorf(spec.KindUnsupported, "x"), codes.Unimplemented, "UNSUPPORTED"},
		{fmt.Errorf("cannot start: %w", spec.Errorf(spec.KindInvalid, "x").WithReason(spec.ReasonProcessNotFound)), codes.InvalidArgument, "PROCESS_NOT_FOUND"},
		// A wait of the daemon's own that ran out, while its caller still waits, is not the caller's deadline.
		{context.DeadlineExceeded, codes.Internal, "INTERNAL"},
	} {
		got := toStatus(t.Context(), c.err)
		info, _ := detailsOf(got)
		if status.Code(got) != c.code || info.GetReason() != c.reason || info.GetDomain() != ErrorDomain {
			t.Errorf("%v: code %v, info %v; want %v, %s", c.err, status.Code(got), info, c.code, c.reason)
		}
		if message := status.Convert(got).Message(); message != c.err.Error() {
			t.Errorf("%v: message %q", c.err, message)
		}
	}
	if len(kinds) != int(spec.KindUnsupported)+1 {
		t.Errorf("%d kinds have a code, spec has %d", len(kinds), spec.KindUnsupported+1)
	}
}

func TestErrorsNameRuleAndField(t *testing.T) {
	denied := spec.Errorf(spec.KindDenied, "no")
	denied.Rule = "strangers"
	info, _ := detailsOf(toStatus(t.Context(), denied))
	if info.GetMetadata()["rule"] != "strangers" {
		t.Errorf("a denial tells %v, want the rule", info.GetMetadata())
	}
	info, bad := detailsOf(toStatus(t.Context(), spec.Invalidf("spec.network", "no such network")))
	if info.GetMetadata()["field"] != "spec.network" || bad.GetFieldViolations()[0].GetField() != "spec.network" {
		t.Errorf("an invalid request tells %v and %v, want the field", info.GetMetadata(), bad)
	}
	hostile := toStatus(t.Context(), errors.New("\xff from inside"))
	if info, _ := detailsOf(hostile); info == nil {
		t.Error("a message that is no UTF-8 loses the details")
	}
}

func TestContextsThatEnd(t *testing.T) {
	canceled, cancel := context.WithCancel(t.Context())
	cancel()
	if got := toStatus(canceled, context.Canceled); status.Code(got) != codes.Canceled {
		t.Errorf("a caller that went away: %v", got)
	}
	late, cancel := context.WithDeadline(t.Context(), time.Unix(0, 0))
	defer cancel()
	if got := toStatus(late, context.DeadlineExceeded); status.Code(got) != codes.DeadlineExceeded {
		t.Errorf("a caller's deadline: %v", got)
	}
	stopping, stop := context.WithCancelCause(t.Context())
	stop(errStopping)
	got := toStatus(stopping, context.Canceled)
	if info, _ := detailsOf(got); status.Code(got) != codes.Unavailable || info.GetReason() != reasonStopping {
		t.Errorf("a daemon that stops: %v", got)
	}
}

func TestInvalidRequestsNameTheField(t *testing.T) {
	h := serve(t, Config{Workloads: &fakeWorkloads{}})
	ctx := t.Context()
	tooSmall := validCreate()
	tooSmall.Spec.Resources = &sandboxdv1.Resources{MemoryBytes: 1}
	noIsolation := validCreate()
	noIsolation.Spec.Isolation = 0
	badCap := validCreate()
	badCap.Spec.CapAdd = []string{"NET_ADMIN", "net raw"}
	nul := validCreate()
	nul.Spec.Process = &sandboxdv1.ProcessSpec{Command: []string{"echo", "a\x00b"}}

	create := func(r *sandboxdv1.CreateWorkloadRequest) error {
		_, err := h.workloads.CreateWorkload(ctx, r)
		return err
	}
	exec := func(r *sandboxdv1.ExecRequest) error {
		stream, err := h.workloads.Exec(ctx)
		if err != nil {
			return err
		}
		if err := stream.Send(r); err != nil {
			return err
		}
		_, err = stream.Recv()
		return err
	}
	for _, c := range []struct {
		field string
		err   error
	}{
		{"spec", create(&sandboxdv1.CreateWorkloadRequest{})},
		{"spec.image", create(&sandboxdv1.CreateWorkloadRequest{Spec: &sandboxdv1.WorkloadSpec{Isolation: 1}})},
		{"spec.isolation", create(noIsolation)},
		{"spec.resources.memory_bytes", create(tooSmall)},
		{"spec.cap_add[1]", create(badCap)},
		{"spec.process.command[1]", create(nul)},
		// In a stream as well, and there in every message.
		{"start.id", exec(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Start{Start: &sandboxdv1.ExecStart{Command: []string{"x"}}}})},
		{"start", exec(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Stdin{Stdin: []byte("too early")}})},
	} {
		_, bad := detailsOf(c.err)
		if status.Code(c.err) != codes.InvalidArgument || len(bad.GetFieldViolations()) == 0 || bad.GetFieldViolations()[0].GetField() != c.field {
			t.Errorf("want %s refused; got %v %v", c.field, c.err, bad)
		}
	}
}

// The rules in the proto are compiled when first used: one that does not compile would be found by a caller.
func TestEveryRuleCompiles(t *testing.T) {
	h := serve(t, Config{Workloads: &fakeWorkloads{}})
	n := 0
	protoregistry.GlobalTypes.RangeMessages(func(m protoreflect.MessageType) bool {
		if m.Descriptor().ParentFile().Package() != "sandboxd.v1" {
			return true
		}
		n++
		if err := h.server.validate(m.New().Interface()); err != nil && spec.KindOf(err) != spec.KindInvalid {
			t.Errorf("%s: %v", m.Descriptor().FullName(), err)
		}
		return true
	})
	if n < 50 {
		t.Errorf("only %d messages were looked at", n)
	}
}

// One call that panics must not end the daemon, nor tell its caller what only the log should know.
func TestPanicsEndOnlyTheirCall(t *testing.T) {
	core, logged := observer.New(zapcore.ErrorLevel)
	h := serve(t, Config{Log: zap.New(core), Workloads: &fakeWorkloads{
		get: func(string) (workload.Workload, error) { panic("secret") },
		logs: func(context.Context, string, workload.LogOptions, func(workload.LogEntry) error) error {
			panic("secret")
		},
		exec: func(context.Context, string, spec.Process) (workload.Session, error) {
			return &fakeSession{input: func(frame) error { panic("secret") }}, nil
		},
	}})
	ctx := t.Context()
	_, unary := h.workloads.GetWorkload(ctx, &sandboxdv1.GetWorkloadRequest{Id: "x"})
	logs, err := h.workloads.StreamLogs(ctx, &sandboxdv1.StreamLogsRequest{Id: "x"})
	if err != nil {
		t.Fatal(err)
	}
	_, stream := logs.Recv()
	// In a goroutine of a handler, too.
	process := startExec(t, h, &sandboxdv1.ExecStart{Id: "x", Command: []string{"x"}, Stdin: true})
	if err := process.Send(stdinFrame("boom")); err != nil {
		t.Fatal(err)
	}
	_, goroutine := process.Recv()
	for what, err := range map[string]error{"unary": unary, "stream": stream, "goroutine": goroutine} {
		if status.Code(err) != codes.Internal || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v, want INTERNAL without the panic's value", what, err)
		}
	}
	stacks := logged.FilterMessage("panic").FilterField(zap.Any("panic", "secret")).All()
	if len(stacks) != 3 || !strings.Contains(fmt.Sprint(stacks[0].ContextMap()["stack"]), "server_test.go") {
		t.Errorf("%d panics were logged with their stack, want 3", len(stacks))
	}
}

// A daemon that stops ends the calls that would wait for ever, and tells them why.
func TestStopEndsLongCalls(t *testing.T) {
	waiting := make(chan struct{}, 3)
	forever := func(ctx context.Context) error {
		waiting <- struct{}{}
		<-ctx.Done()
		return ctx.Err()
	}
	h := serve(t, Config{Workloads: &fakeWorkloads{
		wait: func(ctx context.Context, _ string) (workload.Workload, error) {
			return workload.Workload{}, forever(ctx)
		},
		watch: func(ctx context.Context, _ string, _ time.Time, _ func(workload.Event) error) error {
			return forever(ctx)
		},
		exec: func(context.Context, string, spec.Process) (workload.Session, error) {
			return &fakeSession{output: func(ctx context.Context, _ func(workload.Stream, []byte) error) error { return forever(ctx) }}, nil
		},
	}})
	results := make(chan error, 3)
	go func() {
		_, err := h.workloads.WaitWorkload(t.Context(), &sandboxdv1.WaitWorkloadRequest{Id: "x"})
		results <- err
	}()
	events, err := h.workloads.WatchEvents(t.Context(), &sandboxdv1.WatchEventsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		_, err := events.Recv()
		results <- err
	}()
	process := startExec(t, h, &sandboxdv1.ExecStart{Id: "x", Command: []string{"x"}})
	go func() {
		_, err := process.Recv()
		results <- err
	}()
	for range 3 {
		receive(t, waiting, "a call")
	}
	began := time.Now()
	h.stop()
	if took := time.Since(began); took > stopGrace/2 {
		t.Errorf("stopping took %v: it waited for calls that are long", took)
	}
	for range 3 {
		err := receive(t, results, "the end of a long call")
		if info, _ := detailsOf(err); status.Code(err) != codes.Unavailable || info.GetReason() != reasonStopping {
			t.Errorf("a long call ended with %v, want UNAVAILABLE %s", err, reasonStopping)
		}
	}
}

func TestHealthAndReflection(t *testing.T) {
	h := serve(t, Config{Workloads: &fakeWorkloads{}})
	answer, err := healthpb.NewHealthClient(h.conn).Check(t.Context(), &healthpb.HealthCheckRequest{Service: "sandboxd.v1.WorkloadService"})
	if err != nil || answer.GetStatus() != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("health: %v %v", answer, err)
	}
	stream, err := reflectionpb.NewServerReflectionClient(h.conn).ServerReflectionInfo(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&reflectionpb.ServerReflectionRequest{MessageRequest: &reflectionpb.ServerReflectionRequest_ListServices{}}); err != nil {
		t.Fatal(err)
	}
	services, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, s := range services.GetListServicesResponse().GetService() {
		names = append(names, s.GetName())
	}
	for _, want := range []string{"sandboxd.v1.WorkloadService", "sandboxd.v1.ImageService", "sandboxd.v1.TemplateService", "sandboxd.v1.SnapshotService", "sandboxd.v1.PolicyService", "sandboxd.v1.SystemService", "grpc.health.v1.Health"} {
		if !slices.Contains(names, want) {
			t.Errorf("reflection knows %v, not %s", names, want)
		}
	}
	if err := stream.CloseSend(); err != nil && !errors.Is(err, io.EOF) {
		t.Error(err)
	}
}
