package server

import (
	"context"
	"io"
	"time"

	"github.com/sandboxd/sandboxd/pkg/image"
	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// Workloads is what this package needs of *workload.Manager, where the contract of each method is written. The tests'
// fake is the other implementation.
type Workloads interface {
	lifecycle
	views
	processes
	templates
	snapshots
	// Explain decides and changes nothing.
	Explain(context.Context, workload.CreateOptions) (policy.Decision, error)
	ImageInUse(digest string) bool
	Announce(workload.Event)
}

type lifecycle interface {
	Create(context.Context, workload.CreateOptions) (workload.Workload, error)
	Run(ctx context.Context, o workload.RunOptions, fn func(workload.RunEvent, workload.Workload) error) error
	Start(ctx context.Context, ref string) (workload.Workload, error)
	Stop(ctx context.Context, ref string, grace time.Duration) (workload.Workload, error)
	Kill(ctx context.Context, ref, signal string) error
	Wait(ctx context.Context, ref string) (workload.Workload, error)
	Delete(ctx context.Context, ref string, force bool) error
	Pause(ctx context.Context, ref string) (workload.Workload, error)
	Resume(ctx context.Context, ref string) (workload.Workload, error)
	Update(ctx context.Context, ref string, caller spec.Caller, change func(*spec.Resources)) (workload.Workload, error)
}

type templates interface {
	Templates(context.Context) ([]runtime.Template, error)
	BuildTemplate(context.Context, workload.TemplateOptions) (runtime.Template, error)
	RemoveTemplate(ctx context.Context, prefix string) error
}

type snapshots interface {
	CreateSnapshot(ctx context.Context, ref string, o workload.CreateSnapshotOptions) (workload.Snapshot, error)
	Snapshots(visible func(workload.Snapshot) bool) []workload.Snapshot
	Snapshot(ref string) (workload.Snapshot, spec.Resources, error)
	DeleteSnapshot(ref string) error
	RestoreSnapshot(ctx context.Context, ref string, o workload.RestoreOptions) (workload.Workload, error)
	Fork(ctx context.Context, ref string, o workload.RestoreOptions) (workload.Workload, error)
}

type views interface {
	Get(ref string) (workload.Workload, error)
	List(f workload.Filter, size int, token string) ([]workload.Workload, string, error)
	Logs(ctx context.Context, ref string, o workload.LogOptions, fn func(workload.LogEntry) error) error
	Usage(ctx context.Context, ref string) (workload.Usage, error)
	Watch(ctx context.Context, ref string, since time.Time, fn func(workload.Event) error) error
	OCIConfig(ctx context.Context, ref string) ([]byte, error)
}

type processes interface {
	Exec(ctx context.Context, ref string, p spec.Process) (workload.Session, error)
	ExecInto(ctx context.Context, ref string, p spec.Process, pipes *workload.OutputPipes) (workload.Session, error)
	Attach(ctx context.Context, ref string, fromStart bool) (workload.Session, error)
	CopyIn(ctx context.Context, ref, path string, r io.Reader) error
	CopyOut(ctx context.Context, ref, path string, w io.Writer) error
}

// Images is what this package needs of *image.Store.
type Images interface {
	Import(ctx context.Context, r io.Reader, name string) (image.Image, error)
	Pull(ctx context.Context, ref string, o image.PullOptions) (image.Image, error)
	Get(ref string) (image.Image, error)
	List() ([]image.Image, error)
	Remove(ref string, inUse func(digest string) bool) error
}
