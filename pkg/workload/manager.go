package workload

import (
	"context"
	"io"
	"time"

	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Manager owns every workload of a daemon. Workloads are named by id, by an unambiguous prefix of it of at least four
// digits, or by name; ref stands for any of these.
type Manager struct{}

// CreateOptions are what a caller asks for.
type CreateOptions struct {
	Name   string
	Labels map[string]string
	Spec   spec.Workload
	Caller spec.Caller
}

func (m *Manager) Create(ctx context.Context, o CreateOptions) (Workload, error) { panic("") }

// Start answers when the process runs. An error with reason PROCESS_NOT_FOUND or PROCESS_NOT_EXECUTABLE leaves the
// workload EXITED with 127 or 126.
func (m *Manager) Start(ctx context.Context, ref string) (Workload, error) { panic("") }

func (m *Manager) Get(ref string) (Workload, error) { panic("") }

// Filter selects workloads; the zero value selects all.
type Filter struct {
	// Every pair must match; an empty value matches any.
	Labels    map[string]string
	States    []State
	Isolation spec.Isolation
}

// List answers with at most size workloads, oldest first, and the token of the next page.
func (m *Manager) List(f Filter, size int, token string) ([]Workload, string, error) { panic("") }

func (m *Manager) Stop(ctx context.Context, ref string, grace time.Duration) (Workload, error) {
	panic("")
}

// Kill sends a signal, named (SIGTERM, TERM) or numbered, SIGKILL when empty.
func (m *Manager) Kill(ctx context.Context, ref, signal string) error { panic("") }

// Wait answers when the workload is EXITED or FAILED.
func (m *Manager) Wait(ctx context.Context, ref string) (Workload, error) { panic("") }

func (m *Manager) Delete(ctx context.Context, ref string, force bool) error { panic("") }

// Exec starts a further process in a running workload. Empty User, WorkingDir and Env come from the workload;
// Process.Command is the whole argv.
func (m *Manager) Exec(ctx context.Context, ref string, p spec.Process) (Session, error) {
	panic("")
}

// Attach connects to the workload's own process, also before it has started. With fromStart the output so far comes first.
func (m *Manager) Attach(ctx context.Context, ref string, fromStart bool) (Session, error) {
	panic("")
}

// Session is a caller's connection to a process.
type Session interface {
	// PID in the sandbox's pid namespace; 0 for an attachment.
	PID() int
	// Output calls fn with each piece in order until the process's output ends (nil), fn fails, or ctx is done.
	Output(ctx context.Context, fn func(stream Stream, data []byte) error) error
	// Write returns once the bytes are accepted by the process; io.ErrClosedPipe once it takes no more.
	Write(ctx context.Context, p []byte) error
	CloseStdin(ctx context.Context) error
	Resize(ctx context.Context, size spec.TerminalSize) error
	Signal(ctx context.Context, signal string) error
	Wait(ctx context.Context) (spec.Exit, error)
	// Close ends the session: an exec'd process that still runs is killed and forgotten, an attachment leaves its process alone.
	Close() error
}

// Stream is which of a process's output streams.
type Stream uint8

const (
	Stdout Stream = 1
	Stderr Stream = 2
)

// LogOptions select part of a workload's output.
type LogOptions struct {
	Follow bool
	// Last lines; negative means all.
	Tail  int
	Since time.Time
}

// LogEntry is one piece of output as it was read, not cut at line ends.
type LogEntry struct {
	Time   time.Time
	Stream Stream
	Data   []byte
}

func (m *Manager) Logs(ctx context.Context, ref string, o LogOptions, fn func(LogEntry) error) error {
	panic("")
}

func (m *Manager) CopyIn(ctx context.Context, ref, path string, r io.Reader) error  { panic("") }
func (m *Manager) CopyOut(ctx context.Context, ref, path string, w io.Writer) error { panic("") }

// Usage is what the host counts and what the agent claims.
type Usage struct {
	Workload Workload
	Host     spec.Usage
	Claims   spec.Claims
}

func (m *Manager) Usage(ctx context.Context, ref string) (Usage, error) { panic("") }

// EventType says what happened.
type EventType string

const (
	EventCreated      EventType = "created"
	EventStarting     EventType = "starting"
	EventStarted      EventType = "started"
	EventStopping     EventType = "stopping"
	EventExited       EventType = "exited"
	EventFailed       EventType = "failed"
	EventDeleted      EventType = "deleted"
	EventExecStarted  EventType = "exec-started"
	EventExecExited   EventType = "exec-exited"
	EventRecovered    EventType = "recovered"
	EventImageAdded   EventType = "image-added"
	EventImageRemoved EventType = "image-removed"
)

// Event is something that happened to a workload or an image.
type Event struct {
	Time         time.Time
	Type         EventType
	WorkloadID   string
	WorkloadName string
	Isolation    spec.Isolation
	Message      string
	Attributes   map[string]string
}

// Watch calls fn with each event, the past ones from since on first (unless zero), until ctx is done or fn fails.
// ref, when not empty, selects one workload.
func (m *Manager) Watch(ctx context.Context, ref string, since time.Time, fn func(Event) error) error {
	panic("")
}

// OCIConfig is the effective OCI runtime-spec config, as JSON.
func (m *Manager) OCIConfig(ctx context.Context, ref string) ([]byte, error) { panic("") }

// Explain says what would be decided, and changes nothing. A denial is in the Decision; the error is for requests
// that cannot be decided at all.
func (m *Manager) Explain(ctx context.Context, o CreateOptions) (policy.Decision, error) { panic("") }

// ImageInUse reports whether a workload uses the image of a digest.
func (m *Manager) ImageInUse(digest string) bool { panic("") }

// Announce publishes an event that happened outside the manager.
func (m *Manager) Announce(e Event) { panic("") }
