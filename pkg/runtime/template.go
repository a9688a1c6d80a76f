package runtime

import (
	"context"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Templater is a runtime that can start sandboxes as clones of a template. Which template a sandbox is cloned from, and
// whether there is one, is the runtime's business.
type Templater interface {
	// Templates lists them, the one used last first. KindUnsupported where the runtime is configured to have none, here
	// and below.
	Templates(ctx context.Context) ([]Template, error)
	// BuildTemplate makes the template that s would be cloned from, in the place of one that is there. s needs no ID.
	BuildTemplate(ctx context.Context, s spec.Sandbox) (Template, error)
	// RemoveTemplate removes the one whose id begins with prefix; KindNotFound if there is none.
	RemoveTemplate(ctx context.Context, prefix string) error
}

// Template is what a Templater tells of one.
type Template struct {
	ID string
	// As in the spec.Sandbox it was made for.
	ImagePath string
	Scope     string

	CPUs           uint32
	MemoryBytes    uint64
	Accelerator    string
	AgentTransport string
	MadeAt, UsedAt time.Time
	// Sandboxes cloned from it since the daemon began.
	Clones int
	// Clones made ahead of time that wait for a sandbox.
	Waiting int
	// What it takes on the disk.
	DiskBytes uint64
}
