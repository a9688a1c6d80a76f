package client

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// patience bounds every wait of the tests: a machine under load is slow, not wrong.
const patience = 30 * time.Second

// fakeDaemon answers with what a test put in.
type fakeDaemon struct {
	sandboxdv1.UnimplementedWorkloadServiceServer
	sandboxdv1.UnimplementedImageServiceServer
	exec    func(grpc.BidiStreamingServer[sandboxdv1.ExecRequest, sandboxdv1.ExecResponse]) error
	attach  func(grpc.BidiStreamingServer[sandboxdv1.AttachRequest, sandboxdv1.AttachResponse]) error
	start   func(*sandboxdv1.StartWorkloadRequest) error
	create  func(*sandboxdv1.CreateWorkloadRequest) error
	list    func(*sandboxdv1.ListWorkloadsRequest) *sandboxdv1.ListWorkloadsResponse
	copyIn  func(grpc.ClientStreamingServer[sandboxdv1.CopyInRequest, sandboxdv1.CopyInResponse]) error
	pull    func(grpc.ServerStreamingServer[sandboxdv1.PullImageResponse]) error
	deleted chan string
}

func (f *fakeDaemon) Exec(s grpc.BidiStreamingServer[sandboxdv1.ExecRequest, sandboxdv1.ExecResponse]) error {
	return f.exec(s)
}

func (f *fakeDaemon) Attach(s grpc.BidiStreamingServer[sandboxdv1.AttachRequest, sandboxdv1.AttachResponse]) error {
	return f.attach(s)
}

func (f *fakeDaemon) CreateWorkload(_ context.Context, r *sandboxdv1.CreateWorkloadRequest) (*sandboxdv1.CreateWorkloadResponse, error) {
	return &sandboxdv1.CreateWorkloadResponse{Workload: &sandboxdv1.Workload{Id: "new"}}, f.create(r)
}

func (f *fakeDaemon) StartWorkload(_ context.Context, r *sandboxdv1.StartWorkloadRequest) (*sandboxdv1.StartWorkloadResponse, error) {
	return &sandboxdv1.StartWorkloadResponse{Workload: &sandboxdv1.Workload{Id: r.GetId()}}, f.start(r)
}

func (f *fakeDaemon) DeleteWorkload(_ context.Context, r *sandboxdv1.DeleteWorkloadRequest) (*sandboxdv1.DeleteWorkloadResponse, error) {
	if !r.GetForce() {
		return nil, status.Error(codes.FailedPrecondition, "it may still run")
	}
	f.deleted <- r.GetId()
	return &sandboxdv1.DeleteWorkloadResponse{}, nil
}

func (f *fakeDaemon) ListWorkloads(_ context.Context, r *sandboxdv1.ListWorkloadsRequest) (*sandboxdv1.ListWorkloadsResponse, error) {
	return f.list(r), nil
}

func (f *fakeDaemon) CopyIn(s grpc.ClientStreamingServer[sandboxdv1.CopyInRequest, sandboxdv1.CopyInResponse]) error {
	return f.copyIn(s)
}

func (f *fakeDaemon) PullImage(_ *sandboxdv1.PullImageRequest, s grpc.ServerStreamingServer[sandboxdv1.PullImageResponse]) error {
	return f.pull(s)
}

func dial(t *testing.T, f *fakeDaemon) *Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	s := grpc.NewServer()
	sandboxdv1.RegisterWorkloadServiceServer(s, f)
	sandboxdv1.RegisterImageServiceServer(s, f)
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	c, err := Dial("unix://" + path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		s.Stop()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return c
}

func receive[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("%s did not happen", what)
		panic("unreachable")
	}
}

func TestAddresses(t *testing.T) {
	for address, good := range map[string]bool{
		"unix:///run/x.sock": true, "/run/x.sock": false, "unix://x.sock": false, "unix:/run/x.sock": false,
		"tcp://localhost:1": false, "": false,
	} {
		c, err := Dial(address)
		if (err == nil) != good {
			t.Errorf("Dial(%q): %v", address, err)
		}
		if c != nil {
			c.Close()
		}
	}
}

// Nobody there, in each way: one sentence that says what to do.
func TestUnreachable(t *testing.T) {
	dir := t.TempDir()
	dead := filepath.Join(dir, "dead")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: dead, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	for _, path := range []string{filepath.Join(dir, "none"), dead} {
		c, err := Dial("unix://" + path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_, err = c.System.Info(t.Context(), &sandboxdv1.InfoRequest{})
		if ErrorReason(err) != ReasonUnreachable || !strings.Contains(err.Error(), "start sandboxd") || strings.Contains(err.Error(), "rpc error") {
			t.Errorf("%s: %v (reason %q)", path, err, ErrorReason(err))
		}
	}
	message := (&errorWrapper{address: "unix:///x"}).unreachable("dial unix /x: connect: permission denied")
	if !strings.Contains(message, "group") {
		t.Errorf("permission denied: %q, want it to speak of the group", message)
	}
}

func TestErrorsAreTyped(t *testing.T) {
	refusal, err := status.New(codes.PermissionDenied, "the rule says no").WithDetails(&errdetails.ErrorInfo{
		Domain: "sandboxd", Reason: "POLICY_DENIED", Metadata: map[string]string{"rule": "strangers", "field": "spec.image"},
	})
	if err != nil {
		t.Fatal(err)
	}
	c := dial(t, &fakeDaemon{
		create: func(*sandboxdv1.CreateWorkloadRequest) error { return refusal.Err() },
		exec: func(grpc.BidiStreamingServer[sandboxdv1.ExecRequest, sandboxdv1.ExecResponse]) error {
			return refusal.Err()
		},
	})
	_, unary := c.Workloads.CreateWorkload(t.Context(), &sandboxdv1.CreateWorkloadRequest{})
	_, stream := c.Exec(t.Context(), &sandboxdv1.ExecStart{}, Stdio{})
	for what, err := range map[string]error{"unary": unary, "stream": stream} {
		var e *Error
		if !errors.As(err, &e) || e.Reason != ReasonPolicyDenied || e.Rule != "strangers" || e.Field != "spec.image" ||
			e.Code != codes.PermissionDenied || err.Error() != "the rule says no" || status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %#v", what, err)
		}
	}
	if ErrorReason(errors.New("other")) != "" || ErrorReason(nil) != "" {
		t.Error("other errors have a reason")
	}
}

// catExec sends back what it gets and exits with 4 at the end of input.
func catExec(s grpc.BidiStreamingServer[sandboxdv1.ExecRequest, sandboxdv1.ExecResponse]) error {
	first, err := s.Recv()
	if err != nil {
		return err
	}
	if !first.GetStart().GetStdin() {
		return status.Error(codes.InvalidArgument, "start does not announce stdin")
	}
	if err := s.Send(&sandboxdv1.ExecResponse{Response: &sandboxdv1.ExecResponse_Started{Started: &sandboxdv1.ExecStarted{Pid: 77}}}); err != nil {
		return err
	}
	for {
		r, err := s.Recv()
		if err != nil {
			return err
		}
		if r.GetCloseStdin() != nil {
			break
		}
		if err := s.Send(&sandboxdv1.ExecResponse{Response: &sandboxdv1.ExecResponse_Stdout{Stdout: r.GetStdin()}}); err != nil {
			return err
		}
	}
	if err := s.Send(&sandboxdv1.ExecResponse{Response: &sandboxdv1.ExecResponse_Stderr{Stderr: []byte("done")}}); err != nil {
		return err
	}
	return s.Send(&sandboxdv1.ExecResponse{Response: &sandboxdv1.ExecResponse_Exit{Exit: &sandboxdv1.ProcessExit{Code: 4}}})
}

func TestExecCarriesStreams(t *testing.T) {
	c := dial(t, &fakeDaemon{exec: catExec})
	input := bytes.Repeat([]byte("0123456789"), 300_000)
	var stdout, stderr bytes.Buffer
	p, err := c.Exec(t.Context(), &sandboxdv1.ExecStart{Id: "x", Command: []string{"cat"}},
		Stdio{Stdin: bytes.NewReader(input), Stdout: &stdout, Stderr: &stderr})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	exit, err := p.Wait()
	if err != nil || exit.GetCode() != 4 || p.Pid != 77 {
		t.Fatalf("exit %v, pid %d, %v", exit, p.Pid, err)
	}
	if !bytes.Equal(stdout.Bytes(), input) || stderr.String() != "done" {
		t.Errorf("%d bytes of stdout, %q on stderr", stdout.Len(), stderr.String())
	}
}

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, io.ErrShortWrite }

// A local writer that fails must end the process, not leave it without a reader.
func TestExecEndsWhenOutputCannotBeWritten(t *testing.T) {
	gone := make(chan struct{})
	c := dial(t, &fakeDaemon{exec: func(s grpc.BidiStreamingServer[sandboxdv1.ExecRequest, sandboxdv1.ExecResponse]) error {
		err := errors.Join(
			s.Send(&sandboxdv1.ExecResponse{Response: &sandboxdv1.ExecResponse_Started{Started: &sandboxdv1.ExecStarted{}}}),
			s.Send(&sandboxdv1.ExecResponse{Response: &sandboxdv1.ExecResponse_Stdout{Stdout: []byte("x")}}))
		<-s.Context().Done()
		close(gone)
		return err
	}})
	p, err := c.Exec(t.Context(), &sandboxdv1.ExecStart{Id: "x", Command: []string{"x"}}, Stdio{Stdout: failingWriter{}})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Wait(); !errors.Is(err, io.ErrShortWrite) {
		t.Errorf("%v, want the writer's error", err)
	}
	receive(t, gone, "the end of the call")
}

// endlessReader is input that never ends.
type endlessReader struct{}

func (endlessReader) Read(p []byte) (int, error) { return len(p), nil }

// A process that reads no input holds back what is sent; a signal must not wait for that for ever.
func TestSignalDoesNotHangBehindInput(t *testing.T) {
	release := make(chan struct{})
	c := dial(t, &fakeDaemon{exec: func(s grpc.BidiStreamingServer[sandboxdv1.ExecRequest, sandboxdv1.ExecResponse]) error {
		err := s.Send(&sandboxdv1.ExecResponse{Response: &sandboxdv1.ExecResponse_Started{Started: &sandboxdv1.ExecStarted{}}})
		select {
		case <-release:
		case <-s.Context().Done():
		}
		return err
	}})
	p, err := c.Exec(t.Context(), &sandboxdv1.ExecStart{Id: "x", Command: []string{"x"}}, Stdio{Stdin: endlessReader{}})
	if err != nil {
		t.Fatal(err)
	}
	for {
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		err := p.Signal(ctx, "INT")
		cancel()
		if errors.Is(err, context.DeadlineExceeded) {
			break // input is stuck, and Signal gave up
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	p.Close() // and this does not hang either
	close(release)
	if err := p.Signal(t.Context(), "INT"); err == nil {
		t.Error("a signal to a process that was let go was sent")
	}
}

// runDaemon lets a workload be attached to, started and ended: output comes only when it was attached before the start.
func runDaemon(started chan string, attach func(grpc.BidiStreamingServer[sandboxdv1.AttachRequest, sandboxdv1.AttachResponse]) error) *fakeDaemon {
	return &fakeDaemon{
		create: func(*sandboxdv1.CreateWorkloadRequest) error { return nil },
		start: func(r *sandboxdv1.StartWorkloadRequest) error {
			started <- r.GetId()
			return nil
		},
		attach: func(s grpc.BidiStreamingServer[sandboxdv1.AttachRequest, sandboxdv1.AttachResponse]) error {
			if _, err := s.Recv(); err != nil {
				return err
			}
			if err := s.Send(&sandboxdv1.AttachResponse{Response: &sandboxdv1.AttachResponse_Started{Started: &sandboxdv1.AttachStarted{}}}); err != nil {
				return err
			}
			select {
			case <-started:
			case <-s.Context().Done():
				return s.Context().Err()
			}
			return attach(s)
		},
		deleted: make(chan string, 1),
	}
}

func aRequest() *sandboxdv1.CreateWorkloadRequest {
	return &sandboxdv1.CreateWorkloadRequest{Spec: &sandboxdv1.WorkloadSpec{Image: "x"}}
}

func TestRun(t *testing.T) {
	started := make(chan string, 1)
	f := runDaemon(started, func(s grpc.BidiStreamingServer[sandboxdv1.AttachRequest, sandboxdv1.AttachResponse]) error {
		return errors.Join(
			s.Send(&sandboxdv1.AttachResponse{Response: &sandboxdv1.AttachResponse_Stdout{Stdout: []byte("hello")}}),
			s.Send(&sandboxdv1.AttachResponse{Response: &sandboxdv1.AttachResponse_Exit{Exit: &sandboxdv1.ProcessExit{Code: 3}}}))
	})
	var announced string
	var stdout bytes.Buffer
	request := aRequest()
	exit, err := dial(t, f).Run(t.Context(), request, RunOptions{
		Stdio: Stdio{Stdout: &stdout, Stdin: strings.NewReader("")}, Remove: true,
		Started: func(w *sandboxdv1.Workload, _ *Process) { announced = w.GetId() },
	})
	if err != nil || exit.GetCode() != 3 || stdout.String() != "hello" || announced != "new" {
		t.Errorf("exit %v, output %q, started %q, %v", exit, stdout.String(), announced, err)
	}
	if !request.GetSpec().GetProcess().GetStdin() {
		t.Error("the workload was not asked to keep its input open")
	}
	if id := receive(t, f.deleted, "the removal"); id != "new" {
		t.Errorf("%q was removed", id)
	}
}

// --rm removes also when whoever called has gone, and when the start fails.
func TestRunRemovesHoweverItEnds(t *testing.T) {
	t.Run("canceled", func(t *testing.T) {
		started := make(chan string, 1)
		ctx, cancel := context.WithCancel(t.Context())
		f := runDaemon(started, func(s grpc.BidiStreamingServer[sandboxdv1.AttachRequest, sandboxdv1.AttachResponse]) error {
			cancel()
			<-s.Context().Done()
			return s.Context().Err()
		})
		if _, err := dial(t, f).Run(ctx, aRequest(), RunOptions{Remove: true}); err == nil {
			t.Error("a run that was canceled has an exit")
		}
		receive(t, f.deleted, "the removal")
	})
	t.Run("not started", func(t *testing.T) {
		f := runDaemon(make(chan string, 1), nil)
		f.start = func(*sandboxdv1.StartWorkloadRequest) error { return status.Error(codes.FailedPrecondition, "no") }
		if _, err := dial(t, f).Run(t.Context(), aRequest(), RunOptions{Remove: true}); status.Code(err) != codes.FailedPrecondition {
			t.Errorf("%v, want the start's error", err)
		}
		receive(t, f.deleted, "the removal")
	})
}

func TestListGoesThroughAllPages(t *testing.T) {
	pages := map[string]*sandboxdv1.ListWorkloadsResponse{
		"":  {Workloads: []*sandboxdv1.Workload{{Id: "1"}}, NextPageToken: "2"},
		"2": {Workloads: []*sandboxdv1.Workload{{Id: "2"}}, NextPageToken: "3"},
		"3": {Workloads: []*sandboxdv1.Workload{{Id: "3"}}},
	}
	c := dial(t, &fakeDaemon{list: func(r *sandboxdv1.ListWorkloadsRequest) *sandboxdv1.ListWorkloadsResponse {
		return pages[r.GetPageToken()]
	}})
	all, err := c.ListWorkloads(t.Context(), &sandboxdv1.ListWorkloadsRequest{})
	if err != nil || len(all) != 3 || all[2].GetId() != "3" {
		t.Errorf("%v %v", all, err)
	}
}

// What the daemon says counts, not that sending failed because it had said it.
func TestCopyInTellsTheDaemonsError(t *testing.T) {
	c := dial(t, &fakeDaemon{copyIn: func(grpc.ClientStreamingServer[sandboxdv1.CopyInRequest, sandboxdv1.CopyInResponse]) error {
		return status.Error(codes.NotFound, "no such directory")
	}})
	if err := c.CopyIn(t.Context(), "x", "/none", endlessReader{}); status.Code(err) != codes.NotFound {
		t.Errorf("%v, want the daemon's", err)
	}
}

// A local archive that cannot be read must not look like one that ended: the daemon would take the half for the whole.
func TestCopyInDoesNotEndAtALocalError(t *testing.T) {
	ended := make(chan error, 1)
	c := dial(t, &fakeDaemon{copyIn: func(s grpc.ClientStreamingServer[sandboxdv1.CopyInRequest, sandboxdv1.CopyInResponse]) error {
		for {
			if _, err := s.Recv(); err != nil {
				ended <- err
				return err
			}
		}
	}})
	broken := io.MultiReader(strings.NewReader("half"), iotest.ErrReader(errors.New("disk")))
	if err := c.CopyIn(t.Context(), "x", "/", broken); err == nil {
		t.Error("a broken archive was sent")
	}
	if err := receive(t, ended, "the end of the stream"); errors.Is(err, io.EOF) {
		t.Error("the daemon saw the end of the archive")
	}
}

func TestPull(t *testing.T) {
	c := dial(t, &fakeDaemon{pull: func(s grpc.ServerStreamingServer[sandboxdv1.PullImageResponse]) error {
		return errors.Join(
			s.Send(&sandboxdv1.PullImageResponse{Response: &sandboxdv1.PullImageResponse_Progress{Progress: &sandboxdv1.PullProgress{Phase: "fetch"}}}),
			s.Send(&sandboxdv1.PullImageResponse{Response: &sandboxdv1.PullImageResponse_Image{Image: &sandboxdv1.Image{Digest: "sha256:1"}}}))
	}})
	phases := 0
	image, err := c.PullImage(t.Context(), &sandboxdv1.PullImageRequest{Reference: "x"}, func(*sandboxdv1.PullProgress) { phases++ })
	if err != nil || image.GetDigest() != "sha256:1" || phases != 1 {
		t.Errorf("%v %v, %d reports", image, err, phases)
	}
}
