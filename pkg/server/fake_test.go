package server

import (
	"context"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/image"
	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// patience bounds every wait of the tests: a machine under load is slow, not wrong.
const patience = 30 * time.Second

// fakeWorkloads answers with what a test put in; a method that it did not expect panics, which fails the call.
type fakeWorkloads struct {
	Workloads
	create   func(context.Context, workload.CreateOptions) (workload.Workload, error)
	run      func(context.Context, workload.RunOptions, func(workload.RunEvent, workload.Workload) error) error
	get      func(ref string) (workload.Workload, error)
	list     func(workload.Filter, int, string) ([]workload.Workload, string, error)
	usage    func(context.Context, string) (workload.Usage, error)
	wait     func(context.Context, string) (workload.Workload, error)
	stop     func(context.Context, string, time.Duration) (workload.Workload, error)
	logs     func(context.Context, string, workload.LogOptions, func(workload.LogEntry) error) error
	watch    func(context.Context, string, time.Time, func(workload.Event) error) error
	exec     func(context.Context, string, spec.Process) (workload.Session, error)
	attach   func(context.Context, string, bool) (workload.Session, error)
	execInto func(context.Context, string, spec.Process, *workload.OutputPipes) (workload.Session, error)
	copyIn   func(ctx context.Context, ref, path string, r io.Reader) error
	copyOut  func(ctx context.Context, ref, path string, w io.Writer) error
	update   func(change func(*spec.Resources)) error
	explain  func(context.Context, workload.CreateOptions) (policy.Decision, error)
	inUse    func(string) bool
	snapshot func(ref string) (workload.Snapshot, error)
	events   chan workload.Event
}

func (f *fakeWorkloads) Create(ctx context.Context, o workload.CreateOptions) (workload.Workload, error) {
	return f.create(ctx, o)
}
func (f *fakeWorkloads) Run(ctx context.Context, o workload.RunOptions, fn func(workload.RunEvent, workload.Workload) error) error {
	return f.run(ctx, o, fn)
}
func (f *fakeWorkloads) Get(ref string) (workload.Workload, error) { return f.get(ref) }
func (f *fakeWorkloads) List(w workload.Filter, size int, token string) ([]workload.Workload, string, error) {
	return f.list(w, size, token)
}
func (f *fakeWorkloads) Usage(ctx context.Context, ref string) (workload.Usage, error) {
	return f.usage(ctx, ref)
}
func (f *fakeWorkloads) Wait(ctx context.Context, ref string) (workload.Workload, error) {
	return f.wait(ctx, ref)
}
func (f *fakeWorkloads) Stop(ctx context.Context, ref string, grace time.Duration) (workload.Workload, error) {
	return f.stop(ctx, ref, grace)
}
func (f *fakeWorkloads) Logs(ctx context.Context, ref string, o workload.LogOptions, fn func(workload.LogEntry) error) error {
	return f.logs(ctx, ref, o, fn)
}
func (f *fakeWorkloads) Watch(ctx context.Context, ref string, since time.Time, fn func(workload.Event) error) error {
	return f.watch(ctx, ref, since, fn)
}
func (f *fakeWorkloads) Exec(ctx context.Context, ref string, p spec.Process) (workload.Session, error) {
	return f.exec(ctx, ref, p)
}
func (f *fakeWorkloads) ExecInto(ctx context.Context, ref string, p spec.Process, pipes *workload.OutputPipes) (workload.Session, error) {
	return f.execInto(ctx, ref, p, pipes)
}
func (f *fakeWorkloads) Attach(ctx context.Context, ref string, fromStart bool) (workload.Session, error) {
	return f.attach(ctx, ref, fromStart)
}
func (f *fakeWorkloads) CopyIn(ctx context.Context, ref, path string, r io.Reader) error {
	return f.copyIn(ctx, ref, path, r)
}
func (f *fakeWorkloads) CopyOut(ctx context.Context, ref, path string, w io.Writer) error {
	return f.copyOut(ctx, ref, path, w)
}
func (f *fakeWorkloads) Update(_ context.Context, _ string, _ spec.Caller, change func(*spec.Resources)) (workload.Workload, error) {
	return workload.Workload{}, f.update(change)
}
func (f *fakeWorkloads) Explain(ctx context.Context, o workload.CreateOptions) (policy.Decision, error) {
	return f.explain(ctx, o)
}
func (f *fakeWorkloads) Snapshot(ref string) (workload.Snapshot, spec.Resources, error) {
	s, err := f.snapshot(ref)
	return s, spec.Resources{}, err
}
func (f *fakeWorkloads) ImageInUse(digest string) bool { return f.inUse(digest) }
func (f *fakeWorkloads) Announce(e workload.Event)     { f.events <- e }

type fakeImages struct {
	Images
	imports func(context.Context, io.Reader, string) (image.Image, error)
	pull    func(context.Context, string, image.PullOptions) (image.Image, error)
	get     func(string) (image.Image, error)
	list    func() ([]image.Image, error)
	remove  func(string, func(string) bool) error
}

func (f *fakeImages) Import(ctx context.Context, r io.Reader, name string) (image.Image, error) {
	return f.imports(ctx, r, name)
}
func (f *fakeImages) Pull(ctx context.Context, ref string, o image.PullOptions) (image.Image, error) {
	return f.pull(ctx, ref, o)
}
func (f *fakeImages) Get(ref string) (image.Image, error)              { return f.get(ref) }
func (f *fakeImages) List() ([]image.Image, error)                     { return f.list() }
func (f *fakeImages) Remove(ref string, inUse func(string) bool) error { return f.remove(ref, inUse) }

type fakeRuntime struct {
	runtime.Runtime
	answer runtime.Availability
}

func (f fakeRuntime) Probe(context.Context) runtime.Availability { return f.answer }

// harness is a server on a real Unix socket, since only those tell who calls, and a connection to it.
type harness struct {
	server    *Server
	socket    string
	conn      *grpc.ClientConn
	workloads sandboxdv1.WorkloadServiceClient
	images    sandboxdv1.ImageServiceClient
	policy    sandboxdv1.PolicyServiceClient
	system    sandboxdv1.SystemServiceClient
	stop      func()
}

func serve(t *testing.T, c Config) *harness {
	t.Helper()
	dir := t.TempDir()
	if c.Log == nil {
		c.Log = zaptest.NewLogger(t)
	}
	if c.Policy == nil {
		c.Policy = policy.None()
	}
	c.Host.StateDir, c.Host.RunDir, c.Host.Socket = dir, dir, filepath.Join(dir, "s")
	s, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", c.Host.Socket)
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	conn, err := grpc.NewClient("unix://"+c.Host.Socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64<<20)))
	if err != nil {
		t.Fatal(err)
	}
	h := &harness{
		server: s, socket: c.Host.Socket, conn: conn,
		workloads: sandboxdv1.NewWorkloadServiceClient(conn), images: sandboxdv1.NewImageServiceClient(conn),
		policy: sandboxdv1.NewPolicyServiceClient(conn), system: sandboxdv1.NewSystemServiceClient(conn),
	}
	stopped := false
	h.stop = func() {
		if stopped {
			return
		}
		stopped = true
		s.Stop()
		if err := <-served; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}
	t.Cleanup(func() {
		conn.Close()
		h.stop()
	})
	return h
}

// receive waits for a value.
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

// noImages is a store without images.
type noImages struct{ Images }

func (noImages) Get(ref string) (image.Image, error) {
	return image.Image{}, spec.Errorf(spec.KindNotFound, "no image %s", ref)
}
