package server

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/image"
	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

func TestStopGrace(t *testing.T) {
	var got time.Duration
	h := serve(t, Config{Workloads: &fakeWorkloads{stop: func(_ context.Context, _ string, grace time.Duration) (workload.Workload, error) {
		got = grace
		return workload.Workload{}, nil
	}}})
	for _, c := range []struct {
		asked *durationpb.Duration
		want  time.Duration
	}{{nil, defaultStopGrace}, {durationpb.New(0), 0}, {durationpb.New(time.Minute), time.Minute}} {
		if _, err := h.workloads.StopWorkload(t.Context(), &sandboxdv1.StopWorkloadRequest{Id: "x", Grace: c.asked}); err != nil {
			t.Fatal(err)
		}
		if got != c.want {
			t.Errorf("grace %v became %v, want %v", c.asked, got, c.want)
		}
	}
}

func TestListFilters(t *testing.T) {
	var got workload.Filter
	h := serve(t, Config{Workloads: &fakeWorkloads{list: func(f workload.Filter, size int, token string) ([]workload.Workload, string, error) {
		got = f
		if size != 7 || token != "here" {
			t.Errorf("size %d, token %q; want 7, here", size, token)
		}
		return []workload.Workload{{ID: "one"}}, "next", nil
	}}})
	answer, err := h.workloads.ListWorkloads(t.Context(), &sandboxdv1.ListWorkloadsRequest{
		Labels: map[string]string{"a": "b"}, Isolation: sandboxdv1.Isolation_ISOLATION_VM, PageSize: 7, PageToken: "here",
		States: []sandboxdv1.WorkloadState{sandboxdv1.WorkloadState_WORKLOAD_STATE_EXITED},
	})
	if err != nil || answer.GetNextPageToken() != "next" || answer.GetWorkloads()[0].GetId() != "one" {
		t.Errorf("%v %v", answer, err)
	}
	if got.Labels["a"] != "b" || got.Isolation != spec.IsolationVM || !slices.Equal(got.States, []workload.State{workload.StateExited}) {
		t.Errorf("the manager was asked for %+v", got)
	}
	for _, bad := range []*sandboxdv1.ListWorkloadsRequest{
		{Isolation: sandboxdv1.Isolation_ISOLATION_AUTO},
		{Isolation: 99},
		{States: []sandboxdv1.WorkloadState{0}},
		{States: []sandboxdv1.WorkloadState{99}},
	} {
		if _, err := h.workloads.ListWorkloads(t.Context(), bad); status.Code(err) != codes.InvalidArgument {
			t.Errorf("%v: %v, want INVALID_ARGUMENT", bad, err)
		}
	}
}

// A page of big workloads is made smaller until a client accepts it.
func TestListIsBounded(t *testing.T) {
	big := workload.Workload{ID: "big", Spec: spec.Workload{Process: spec.Process{Env: []string{"A=" + strings.Repeat("x", 3<<20)}}}}
	h := serve(t, Config{Workloads: &fakeWorkloads{list: func(_ workload.Filter, size int, _ string) ([]workload.Workload, string, error) {
		return slices.Repeat([]workload.Workload{big}, size), fmt.Sprint("after ", size), nil
	}}})
	answer, err := h.workloads.ListWorkloads(t.Context(), &sandboxdv1.ListWorkloadsRequest{PageSize: 40})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(answer.GetWorkloads()); n != 5 || answer.GetNextPageToken() != "after 5" {
		t.Errorf("%d workloads and token %q, want 5 with the token after them", n, answer.GetNextPageToken())
	}
}

func TestLogs(t *testing.T) {
	since := time.Unix(1000, 0).UTC()
	var got workload.LogOptions
	long := bytes.Repeat([]byte("0123456789abcdef"), pieceBytes/16+1)
	h := serve(t, Config{Workloads: &fakeWorkloads{logs: func(_ context.Context, _ string, o workload.LogOptions, fn func(workload.LogEntry) error) error {
		got = o
		return errors.Join(
			fn(workload.LogEntry{Time: since, Stream: workload.Stdout, Data: long}),
			fn(workload.LogEntry{Time: since, Stream: workload.Stderr, Data: []byte("err")}),
		)
	}}})
	tail := uint32(0)
	for _, c := range []struct {
		request *sandboxdv1.StreamLogsRequest
		want    workload.LogOptions
	}{
		{&sandboxdv1.StreamLogsRequest{Id: "x"}, workload.LogOptions{Tail: -1}},
		{&sandboxdv1.StreamLogsRequest{Id: "x", Follow: true, Tail: &tail, Since: timeToAPI(since)}, workload.LogOptions{Follow: true, Tail: 0, Since: since}},
	} {
		stream, err := h.workloads.StreamLogs(t.Context(), c.request)
		if err != nil {
			t.Fatal(err)
		}
		var stdout, stderr []byte
		for {
			r, err := stream.Recv()
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			switch r.GetStream() {
			case sandboxdv1.OutputStream_OUTPUT_STREAM_STDOUT:
				stdout = append(stdout, r.GetData()...)
			case sandboxdv1.OutputStream_OUTPUT_STREAM_STDERR:
				stderr = append(stderr, r.GetData()...)
			}
			if len(r.GetData()) > pieceBytes || !r.GetTime().AsTime().Equal(since) {
				t.Errorf("a piece of %d bytes at %v", len(r.GetData()), r.GetTime())
			}
		}
		if !bytes.Equal(stdout, long) || string(stderr) != "err" {
			t.Errorf("%d bytes of stdout and %q", len(stdout), stderr)
		}
		if got != c.want {
			t.Errorf("%v became %+v, want %+v", c.request, got, c.want)
		}
	}
}

func TestCopyStreams(t *testing.T) {
	body := bytes.Repeat([]byte("tar"), 1<<20)
	var in []byte
	h := serve(t, Config{Workloads: &fakeWorkloads{
		copyIn: func(_ context.Context, ref, path string, r io.Reader) (err error) {
			if ref != "x" || path != "/srv" {
				t.Errorf("copy to %s:%s", ref, path)
			}
			in, err = io.ReadAll(r)
			return err
		},
		copyOut: func(_ context.Context, _, _ string, w io.Writer) error {
			_, err := w.Write(body)
			return err
		},
	}})
	stream, err := h.workloads.CopyIn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	start := &sandboxdv1.CopyInStart{Id: "x", Path: "/srv"}
	err = stream.Send(&sandboxdv1.CopyInRequest{Request: &sandboxdv1.CopyInRequest_Start{Start: start}})
	for piece := range slices.Chunk(body, 100_000) {
		err = errors.Join(err, stream.Send(&sandboxdv1.CopyInRequest{Request: &sandboxdv1.CopyInRequest_Data{Data: piece}}))
	}
	if _, closeErr := stream.CloseAndRecv(); errors.Join(err, closeErr) != nil {
		t.Fatal(err, closeErr)
	}
	if !bytes.Equal(in, body) {
		t.Errorf("%d bytes arrived, want %d, equal", len(in), len(body))
	}

	out, err := h.workloads.CopyOut(t.Context(), &sandboxdv1.CopyOutRequest{Id: "x", Path: "/srv"})
	if err != nil {
		t.Fatal(err)
	}
	var got []byte
	for {
		r, err := out.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, r.GetData()...)
	}
	if !bytes.Equal(got, body) {
		t.Errorf("%d bytes arrived, want %d, equal", len(got), len(body))
	}

	// A second start in the middle is the client's mistake, not data.
	stream, err = h.workloads.CopyIn(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := stream.Send(&sandboxdv1.CopyInRequest{Request: &sandboxdv1.CopyInRequest_Start{Start: start}}); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	if _, err := stream.CloseAndRecv(); status.Code(err) != codes.InvalidArgument {
		t.Errorf("two starts: %v, want INVALID_ARGUMENT", err)
	}
}

func TestImages(t *testing.T) {
	img := image.Image{Digest: "sha256:abc", Names: []string{"debian:12"}, SizeBytes: 5}
	var removed string
	events := make(chan workload.Event, 3)
	h := serve(t, Config{
		Workloads: &fakeWorkloads{events: events, inUse: func(digest string) bool { return digest == img.Digest }},
		Images: &fakeImages{
			imports: func(_ context.Context, r io.Reader, name string) (image.Image, error) {
				b, err := io.ReadAll(r)
				if string(b) != "archive" || name != "debian:12" {
					t.Errorf("import of %q as %q", b, name)
				}
				return img, err
			},
			pull: func(_ context.Context, ref string, o image.PullOptions) (image.Image, error) {
				// Faster than a person reads: most of it is not sent. The last of a layer is.
				for done := range int64(1000) {
					o.Progress(image.Progress{Phase: "fetch", Layer: "sha256:l", Done: done + 1, Total: 1000})
				}
				for range 1000 {
					o.Progress(image.Progress{Phase: "fetch", Layer: "sha256:l", Done: 1000, Total: 1000})
				}
				return img, nil
			},
			get: func(string) (image.Image, error) { return img, nil },
			remove: func(ref string, inUse func(string) bool) error {
				removed = ref
				if !inUse(img.Digest) {
					t.Error("the store was not told that the image is in use")
				}
				return nil
			},
		},
	})
	imports, err := h.images.ImportImage(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	err = errors.Join(
		imports.Send(&sandboxdv1.ImportImageRequest{Request: &sandboxdv1.ImportImageRequest_Start{Start: &sandboxdv1.ImportImageStart{Name: "debian:12"}}}),
		imports.Send(&sandboxdv1.ImportImageRequest{Request: &sandboxdv1.ImportImageRequest_Data{Data: []byte("arch")}}),
		imports.Send(&sandboxdv1.ImportImageRequest{Request: &sandboxdv1.ImportImageRequest_Data{Data: []byte("ive")}}))
	if err != nil {
		t.Fatal(err)
	}
	imported, err := imports.CloseAndRecv()
	if err != nil || imported.GetImage().GetDigest() != img.Digest {
		t.Errorf("import: %v %v", imported, err)
	}

	pull, err := h.images.PullImage(t.Context(), &sandboxdv1.PullImageRequest{Reference: "debian:12"})
	if err != nil {
		t.Fatal(err)
	}
	var reports, lastDone uint64
	var pulled *sandboxdv1.Image
	for {
		r, err := pull.Recv()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if p := r.GetProgress(); p != nil {
			reports++
			lastDone = p.GetDoneBytes()
		}
		pulled = r.GetImage()
	}
	if pulled.GetDigest() != img.Digest || lastDone != 1000 || reports > 100 {
		t.Errorf("pull: image %v, %d reports, the last of %d bytes; want the image last, few reports, the last of 1000", pulled, reports, lastDone)
	}

	if _, err := h.images.RemoveImage(t.Context(), &sandboxdv1.RemoveImageRequest{Reference: "debian:12"}); err != nil || removed != "debian:12" {
		t.Errorf("remove of %q: %v", removed, err)
	}
	for _, want := range []workload.EventType{workload.EventImageAdded, workload.EventImageAdded, workload.EventImageRemoved} {
		if e := receive(t, events, "an event"); e.Type != want || e.Attributes["digest"] != img.Digest {
			t.Errorf("event %+v, want %s", e, want)
		}
	}
}

func TestListImagesByPages(t *testing.T) {
	var images []image.Image
	for i := range 25 {
		// Some made at the same time.
		images = append(images, image.Image{Digest: fmt.Sprintf("sha256:%02d", i), CreatedAt: time.Unix(int64(i/3), int64(i%2))})
	}
	h := serve(t, Config{Workloads: &fakeWorkloads{}, Images: &fakeImages{list: func() ([]image.Image, error) { return slices.Clone(images), nil }}})
	seen := make(map[string]int)
	request := &sandboxdv1.ListImagesRequest{PageSize: 10}
	pages := 0
	for {
		pages++
		answer, err := h.images.ListImages(t.Context(), request)
		if err != nil {
			t.Fatal(err)
		}
		for _, i := range answer.GetImages() {
			seen[i.GetDigest()]++
		}
		if request.PageToken = answer.GetNextPageToken(); request.PageToken == "" {
			break
		}
	}
	if len(seen) != 25 || pages != 3 {
		t.Errorf("%d images on %d pages, want 25 on 3", len(seen), pages)
	}
	for digest, n := range seen {
		if n != 1 {
			t.Errorf("%s came %d times", digest, n)
		}
	}
}

func TestExplain(t *testing.T) {
	decision := policy.Decision{Isolation: spec.IsolationVM, Rule: "r", Reason: "because", Trace: []policy.Trace{{Rule: "r", When: "true", Matched: true}}}
	granted := decision
	granted.Allowed, granted.Granted = true, spec.IsolationVM
	denied := spec.Errorf(spec.KindDenied, "denied").WithReason(spec.ReasonPolicyDenied)
	unsatisfiable := spec.Errorf(spec.KindWrongState, "no kvm here").WithReason(spec.ReasonUnsatisfiable)
	for _, c := range []struct {
		name     string
		decision policy.Decision
		err      error
		check    func(*sandboxdv1.ExplainResponse) bool
		code     codes.Code
	}{
		{"granted", granted, nil, func(r *sandboxdv1.ExplainResponse) bool {
			return r.GetAllowed() && r.GetDecision().GetGranted() == sandboxdv1.Isolation_ISOLATION_VM && r.GetTrace()[0].GetMatched()
		}, codes.OK},
		// An answer, whether the manager says it with an error or without.
		{"denied", decision, denied, func(r *sandboxdv1.ExplainResponse) bool {
			return !r.GetAllowed() && r.GetDecision().GetRule() == "r" && r.GetUnsatisfiable() == ""
		}, codes.OK},
		{"denied without error", decision, nil, func(r *sandboxdv1.ExplainResponse) bool { return !r.GetAllowed() }, codes.OK},
		{"unsatisfiable", granted, unsatisfiable, func(r *sandboxdv1.ExplainResponse) bool {
			return !r.GetAllowed() && r.GetUnsatisfiable() == "no kvm here"
		}, codes.OK},
		{"undecidable", policy.Decision{}, spec.Errorf(spec.KindNotFound, "no such image"), nil, codes.NotFound},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := serve(t, Config{Workloads: &fakeWorkloads{explain: func(context.Context, workload.CreateOptions) (policy.Decision, error) {
				return c.decision, c.err
			}}})
			r, err := h.policy.Explain(t.Context(), &sandboxdv1.ExplainRequest{Spec: validCreate().GetSpec()})
			if status.Code(err) != c.code {
				t.Fatalf("%v, want %v", err, c.code)
			}
			if c.check != nil && !c.check(r) {
				t.Errorf("answer %v", r)
			}
		})
	}
}

func TestGetPolicy(t *testing.T) {
	source := []byte("version: 1\ndefault: deny\nrules:\n  - name: all\n    when: 'true'\n    isolation: vm\n    reason: why not\n")
	p, err := policy.Load(source, "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	h := serve(t, Config{Workloads: &fakeWorkloads{}, Policy: p})
	r, err := h.policy.GetPolicy(t.Context(), &sandboxdv1.GetPolicyRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if r.GetSource() != string(source) || r.GetDigest() != p.Digest() || r.GetDefault() != "deny" ||
		r.GetRules()[0].GetName() != "all" || r.GetRules()[0].GetAnswer() != "vm" || r.GetRules()[0].GetReason() != "why not" {
		t.Errorf("%v", r)
	}
}

func TestInfoAndDoctor(t *testing.T) {
	h := serve(t, Config{
		Workloads: &fakeWorkloads{},
		Host:      Host{Version: "1.2.3", Commit: "abc", CgroupMode: "hybrid"},
		Runtimes: map[spec.Isolation]runtime.Runtime{
			spec.IsolationContainer: fakeRuntime{answer: runtime.Availability{Available: true, Reason: "works", AgentTransport: "unix"}},
			spec.IsolationVM: fakeRuntime{answer: runtime.Availability{
				Reason: "does not boot", VMMVersion: "7.2", GuestKernel: "/boot/vmlinuz",
				Checks: []runtime.Check{{Name: "kvm", Result: "failed", Finding: "no", Advice: "get one"}},
			}},
		},
	})
	info, err := h.system.Info(t.Context(), &sandboxdv1.InfoRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if info.GetVersion() != "1.2.3" || info.GetQemuVersion() != "7.2" || info.GetGuestKernel() != "/boot/vmlinuz" ||
		info.GetCgroupVersion() != "hybrid" || info.GetKernelRelease() == "" || info.GetAgentProtocolVersion() != spec.ProtocolVersion ||
		len(info.GetIsolations()) != 2 || !info.GetIsolations()[0].GetAvailable() || info.GetIsolations()[1].GetAvailable() {
		t.Errorf("%v", info)
	}
	doctor, err := h.system.Doctor(t.Context(), &sandboxdv1.DoctorRequest{})
	if err != nil {
		t.Fatal(err)
	}
	results := make(map[string]sandboxdv1.Check_Result)
	for _, c := range doctor.GetChecks() {
		results[c.GetName()] = c.GetResult()
		if c.GetResult() == 0 || c.GetFinding() == "" || (c.GetResult() != sandboxdv1.Check_RESULT_OK) != (c.GetAdvice() != "") {
			t.Errorf("check %v: want a result, a finding, and advice unless ok", c)
		}
	}
	for name, want := range map[string]sandboxdv1.Check_Result{
		"version": sandboxdv1.Check_RESULT_OK, "cgroups": sandboxdv1.Check_RESULT_WARNING,
		"container isolation": sandboxdv1.Check_RESULT_OK, "vm isolation": sandboxdv1.Check_RESULT_FAILED, "vm: kvm": sandboxdv1.Check_RESULT_FAILED,
	} {
		if results[name] != want {
			t.Errorf("%s: %v, want %v", name, results[name], want)
		}
	}
}

func TestDoctorLooksAtTheHost(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if c := checkDir("dir", dir, 0o077); c.Result != "ok" {
		t.Errorf("a good directory: %+v", c)
	}
	if c := checkDir("dir", dir+"/none", 0o077); c.Result != "failed" {
		t.Errorf("no directory: %+v", c)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if c := checkDir("dir", dir, 0o077); c.Result != "failed" {
		t.Errorf("a directory others may read: %+v", c)
	}
	socket := dir + "/s"
	if c := checkSocket(socket); c.Result != "failed" {
		t.Errorf("no socket: %+v", c)
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for mode, want := range map[os.FileMode]string{0o660: "ok", 0o600: "ok", 0o666: "failed"} {
		if err := os.Chmod(socket, mode); err != nil {
			t.Fatal(err)
		}
		if c := checkSocket(socket); c.Result != want {
			t.Errorf("socket of mode %o: %+v, want %s", mode, c, want)
		}
	}
}
