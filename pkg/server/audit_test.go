package server

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/access"
	"github.com/sandboxd/sandboxd/pkg/audit"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// audited gives a server an audit log, and a function that answers with its lines since it was called last.
func audited(t *testing.T, s *Server) func() []auditLine {
	t.Helper()
	path := filepath.Join(t.TempDir(), "audit.log")
	l, err := audit.Open(audit.Config{Path: path, SizeBytes: 64 << 20, Keep: 1})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	s.Audit = l
	read := 0
	return func() (out []auditLine) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for line := range bytes.Lines(b[read:]) {
			var l auditLine
			if err := json.Unmarshal(line, &l); err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			if l.Who.Transport == "daemon" {
				continue // the test changes the roles
			}
			out = append(out, l)
		}
		read = len(b)
		return out
	}
}

// Every method of the API, by a role that may and by one that may not: what changes something has its lines, what looks has none.
func TestEveryChangeHasItsLines(t *testing.T) {
	h := accessHarness(t)
	lines := audited(t, h.server)
	uid := uint32(os.Geteuid())
	methodsSeen := 0
	for _, allowed := range []bool{true, false} {
		verbs := ""
		if allowed {
			var all []string
			for _, v := range access.Verbs {
				all = append(all, string(v))
			}
			verbs = strings.Join(all, ", ")
		}
		h.server.SetAccess(roles(t, strings.Replace(fullRole, "%s", verbs, 1), int(uid)))
		eachMethod(t, func(full string, m protoreflect.MethodDescriptor) {
			request := minimal(t, m.Input())
			label(request, "a")
			err := invoke(t.Context(), h.conn, full, m, request)
			got := lines()
			stream := m.IsStreamingClient() || m.IsStreamingServer()
			want := 0
			switch {
			case !methods[full].audited:
			case allowed && stream:
				want = 2
			default:
				want = 1
			}
			if len(got) != want {
				t.Fatalf("%s, allowed %t: %d lines, want %d: %+v", full, allowed, len(got), want, got)
			}
			if want == 0 {
				return
			}
			methodsSeen++
			last := got[len(got)-1]
			if last.Method != full || last.Who.Transport != "unix" || last.Who.UID == nil || *last.Who.UID != uid || last.Who.PID != int32(os.Getpid()) ||
				last.Code != status.Code(err).String() || last.TookMS == nil || last.Time.IsZero() || last.Call == "" {
				t.Errorf("%s: who, what or outcome is missing: %+v, after %v", full, last, err)
			}
			if !allowed {
				if last.Decision != "denied" || last.Rule != "full.may" || last.Reason != reasonForbidden {
					t.Errorf("%s: %+v, want denied by full.may", full, last)
				}
				return
			}
			if last.Decision != "allowed" || last.Rule != "full" {
				t.Errorf("%s: %+v, want allowed by full", full, last)
			}
			if methods[full].on == onWorkload && last.Workload != strings.Repeat("ab", 16) {
				t.Errorf("%s: of workload %q, want its full id", full, last.Workload)
			}
			if stream && (got[0].Part != "begin" || got[0].Code != "" || last.Part != "end" || got[0].Call != last.Call) {
				t.Errorf("%s: a stream has the lines %+v", full, got)
			}
		})
	}
	if methodsSeen < 20 {
		t.Errorf("only %d calls were audited", methodsSeen)
	}
}

// A line is there before its call is answered, so whoever got an answer finds it.
func TestPolicysDenialNamesItsRule(t *testing.T) {
	h := accessHarness(t)
	lines := audited(t, h.server)
	fake := h.server.Workloads.(*fakeWorkloads)
	fake.create = createFails(&spec.Error{Kind: spec.KindDenied, Reason: spec.ReasonPolicyDenied, Rule: "strangers-code", Err: errors.New("no")})
	_, err := h.workloads.CreateWorkload(t.Context(), validCreate())
	got := lines()
	if len(got) != 1 || got[0].Decision != "denied" || got[0].Rule != "strangers-code" || got[0].Reason != spec.ReasonPolicyDenied {
		t.Errorf("%+v after %v", got, err)
	}
	if got[0].Request["spec"].(map[string]any)["image"] != "debian" {
		t.Errorf("the line does not say what was asked for: %v", got[0].Request)
	}
}

// What one call does in place of several is in the log as those would be, also what it does after its caller has gone.
func TestRunIsAuditedStepByStep(t *testing.T) {
	h := accessHarness(t)
	lines := audited(t, h.server)
	finish, finished := make(chan struct{}), make(chan struct{})
	h.server.Workloads.(*fakeWorkloads).run = func(ctx context.Context, o workload.RunOptions, fn func(workload.RunEvent, workload.Workload) error) error {
		for _, e := range []workload.RunEvent{workload.RunCreated, workload.RunStarted} {
			if err := o.Begin(e)("the id", nil); err != nil {
				return err
			}
		}
		go func() {
			defer close(finished)
			<-finish
			_ = o.Begin(workload.RunRemoved)("the id", spec.Errorf(spec.KindUnavailable, "later").WithReason("LATER"))
		}()
		return fn(workload.RunStarted, workload.Workload{ID: "the id"})
	}
	s, err := h.workloads.RunWorkload(t.Context(), &sandboxdv1.RunWorkloadRequest{Spec: validCreate().GetSpec(), Detach: true, RemoveWhenEnded: true})
	if err != nil {
		t.Fatal(err)
	}
	if r, err := s.Recv(); err != nil || r.GetEvent() != sandboxdv1.RunEvent_RUN_EVENT_STARTED {
		t.Fatalf("answered %v, %v", r, err)
	}
	if _, err := s.Recv(); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	close(finish)
	<-finished
	var got []string
	for _, l := range lines() {
		got = append(got, fmt.Sprintf("%s %s %s %s %s", path.Base(l.Method), l.Part, l.Workload, l.Code, l.Reason))
		if l.Decision != "allowed" || l.Call == "" || l.Who.UID == nil {
			t.Errorf("a line lacks something: %+v", l)
		}
	}
	want := []string{"RunWorkload begin   ", "StartWorkload  the id OK ", "RunWorkload end the id OK ", "DeleteWorkload  the id Unavailable LATER"}
	if !slices.Equal(got, want) {
		t.Errorf("the log has\n%q, want\n%q", got, want)
	}
}

// What the tables do not call public is in no line, in whatever field of whatever request; what they do is.
func TestNoSecretsInTheAuditLog(t *testing.T) {
	const secret, public = "SECRET", "PUBLIC"
	seen := 0
	eachMethod(t, func(full string, m protoreflect.MethodDescriptor) {
		if !methods[full].audited {
			return
		}
		for i := range max(1, oneofsOf(m.Input())) {
			request := minimal(t, m.Input())
			var open []string
			mark(request.ProtoReflect(), i, func(f protoreflect.FieldDescriptor) string {
				if fields[f.FullName()].audited {
					open = append(open, string(f.Name()))
					return public
				}
				return secret
			})
			b, err := json.Marshal(auditedRequest(request))
			if err != nil {
				t.Fatal(err)
			}
			if strings.Contains(string(b), secret) {
				t.Errorf("%s: %s", full, b)
			}
			for _, name := range open {
				seen++
				if !strings.Contains(string(b), `"`+name+`":`) {
					t.Errorf("%s: %s is missing in %s", full, name, b)
				}
			}
		}
	})
	if seen < 30 {
		t.Errorf("only %d public fields were looked for", seen)
	}
	b, _ := json.Marshal(auditedRequest(&sandboxdv1.ExecStart{Command: []string{"psql", "password=" + secret}, Env: []string{"TOKEN=" + secret}}))
	if want := `{"command":{"arguments":1,"program":"psql"},"env":["TOKEN"]}`; string(b) != want {
		t.Errorf("%s, want %s", b, want)
	}
}

func oneofsOf(d protoreflect.MessageDescriptor) int {
	if d.Oneofs().Len() == 0 {
		return 1
	}
	return d.Oneofs().Get(0).Fields().Len()
}

// mark sets every field of a message; of a choice the n-th.
func mark(m protoreflect.Message, n int, text func(protoreflect.FieldDescriptor) string) {
	for i := range m.Descriptor().Fields().Len() {
		f := m.Descriptor().Fields().Get(i)
		if o := f.ContainingOneof(); o != nil && !o.IsSynthetic() && o.Fields().Get(n) != f {
			continue
		}
		words := func() string {
			if f.Name() == "env" {
				return "NAME=" + text(f)
			}
			return text(f)
		}
		switch {
		case f.IsMap():
			m.Mutable(f).Map().Set(protoreflect.ValueOfString("key").MapKey(), protoreflect.ValueOfString(words()))
		case f.IsList() && f.Message() != nil:
			mark(m.Mutable(f).List().AppendMutable().Message(), n, text)
		case f.IsList() && f.Kind() == protoreflect.StringKind:
			list := m.Mutable(f).List()
			list.Truncate(0)
			if fields[f.FullName()].summary != nil && f.Name() != "env" {
				list.Append(protoreflect.ValueOfString("program"))
			}
			list.Append(protoreflect.ValueOfString(words()))
		case f.Kind() == protoreflect.StringKind:
			m.Set(f, protoreflect.ValueOfString(words()))
		case f.Kind() == protoreflect.BytesKind:
			m.Set(f, protoreflect.ValueOfBytes([]byte(words())))
		case f.Kind() == protoreflect.MessageKind && ours(f.Message()):
			mark(m.Mutable(f).Message(), n, text)
		}
	}
}

// Whoever asks for a lot cannot hide a part of it: the largest request that is well-formed still fits in a line with all of its
// mounts and capabilities.
func TestLargestRequestFitsInALine(t *testing.T) {
	long := strings.Repeat("\"\x01é<", 2000)
	r := &sandboxdv1.CreateWorkloadRequest{Name: long[:63], Labels: map[string]string{}, Spec: &sandboxdv1.WorkloadSpec{
		Image: long[:512], Hostname: long[:64], Process: &sandboxdv1.ProcessSpec{Entrypoint: []string{long}, User: long[:128], WorkingDir: long[:4096]},
	}}
	for i := range 64 {
		r.Labels[strings.Repeat("k", 100)+string(rune('0'+i))] = long[:1024]
		r.Spec.Mounts = append(r.Spec.Mounts, &sandboxdv1.Mount{Type: sandboxdv1.Mount_TYPE_BIND, Source: long[:4096], Target: long[:4096]})
		r.Spec.CapAdd = append(r.Spec.CapAdd, "CAP_"+strings.Repeat("A", 32))
		r.Spec.CapDrop = r.Spec.CapAdd
	}
	for range 4096 {
		r.Spec.Process.Env = append(r.Spec.Process.Env, long+"=x")
	}
	got := auditedRequest(r)
	b, err := json.Marshal(got)
	if err != nil || len(b) > auditRequestBytes {
		t.Fatalf("%d bytes, at most %d fit: %v", len(b), auditRequestBytes, err)
	}
	within, _ := got["spec"].(map[string]any)
	mounts, _ := within["mounts"].([]any)
	caps, _ := within["cap_add"].([]any)
	if len(mounts) != 64 || len(caps) != 64 {
		t.Errorf("%d mounts and %d capabilities of 64 are in the line: %.300s", len(mounts), len(caps), b)
	}
}

// When nothing can be written nothing is changed but stopped and removed; what looks is served.
func TestUnwritableAuditLogRefusesChanges(t *testing.T) {
	h := accessHarness(t)
	h.server.SetAccess(roles(t, "  - {name: all, everything: true}", os.Geteuid()))
	// Its own directory in the way stands for a disk that takes nothing more; pkg/audit tests a full one.
	dir := t.TempDir()
	broken, err := audit.Open(audit.Config{Path: filepath.Join(dir, "sub", "audit.log"), SizeBytes: audit.MinSizeBytes, Keep: 1})
	if err != nil {
		t.Fatal(err)
	}
	h.server.Audit = broken
	if err := errors.Join(broken.Close(), os.RemoveAll(filepath.Join(dir, "sub"))); err != nil {
		t.Fatal(err)
	}
	goesOn := []string{"StopWorkload", "KillWorkload", "PauseWorkload", "DeleteWorkload", "RemoveImage"}
	eachMethod(t, func(full string, m protoreflect.MethodDescriptor) {
		err := invoke(t.Context(), h.conn, full, m, minimal(t, m.Input()))
		info, _ := detailsOf(err)
		refused := status.Code(err) == codes.Unavailable && info.GetReason() == reasonAuditUnavailable
		if want := methods[full].audited && !slices.Contains(goesOn, string(m.Name())) && !takesAway(full); refused != want {
			t.Errorf("%s: refused %t, want %t: %v", full, refused, want, err)
		}
		if slices.Contains(goesOn, string(m.Name())) && refused {
			t.Errorf("%s is refused: who has to stop or remove something must be able to", full)
		}
	})
	if broken.Lost() == 0 {
		t.Error("calls without a line were not counted")
	}
	h.server.Audit = nil
}

func createFails(err error) func(context.Context, workload.CreateOptions) (workload.Workload, error) {
	return func(context.Context, workload.CreateOptions) (workload.Workload, error) {
		return workload.Workload{}, err
	}
}
