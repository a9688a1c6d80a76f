// Package runtime is the seam between what a workload is and the walls it runs behind. No code above it asks which
// runtime it has.
package runtime

import (
	"context"
	"net"
	"os"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// ErrNotRunning: the sandbox is not there, or its host processes are gone.
var ErrNotRunning = spec.Errorf(spec.KindWrongState, "sandbox is not running")

// Runtime builds walls. Its methods may be called concurrently for different sandboxes; for one sandbox the caller
// makes one call at a time.
type Runtime interface {
	// Start boots s until its agent can be dialled. If it fails, nothing of s is left on the host. The instance
	// outlives the daemon: only Kill or Remove ends it.
	Start(ctx context.Context, s spec.Sandbox) (Instance, error)
	// Attach finds an instance that an earlier daemon started; ErrNotRunning if there is none.
	Attach(ctx context.Context, id string) (Instance, error)
	// Remove deletes everything on the host that bears id, kills what still runs and waits until it has gone. What has lost
	// its name the kernel may give back a moment later: the disk space of a file, the loop device before it. Idempotent; works on half-made instances and on unknown ids.
	Remove(ctx context.Context, id string) error
	// Release is like Remove, but keeps the writable layer for a next Start of the same id: what the workload wrote
	// survives its stop.
	Release(ctx context.Context, id string) error
	// List names every sandbox of which something is on the host, running or not, so that recovery finds what no record
	// speaks of.
	List(ctx context.Context) ([]string, error)
}

// Launcher is a Runtime that can tell an agent what to run as it boots.
type Launcher interface {
	// Launch is Start, and has the agent do what message says (an encoded agentv1.Launch) before it serves. message is called
	// once the facts are known, before anything runs; if it fails so does the start. The answer (an encoded
	// agentv1.LaunchResult) comes from inside: it is bounded, and a claim.
	Launch(ctx context.Context, s spec.Sandbox, message func(Launching) ([]byte, error)) (Instance, []byte, error)
}

// Preparer is a Runtime that may make roots ahead of time; Prepares says whether it looks at spec.Sandbox.Prepare.
type Preparer interface {
	Prepares() bool
}

// Launching is what is known of a sandbox that has no Instance yet.
type Launching struct {
	Facts Facts
	// Dial and Done are the Instance's. What is sent over a connection is read when the agent serves. If there will be no
	// Instance, Done is never closed.
	Dial func(ctx context.Context) (net.Conn, error)
	Done <-chan struct{}
}

// Instance is a booted sandbox seen from the host. What it says is a fact.
type Instance interface {
	// Dial connects to the agent, until Done is closed; afterwards ErrNotRunning. It may be called again when a
	// connection is lost.
	Dial(ctx context.Context) (net.Conn, error)
	// Kill ends every process of the sandbox at once. Idempotent; does not wait.
	Kill() error
	// Done is closed when the last host process of the sandbox has gone.
	Done() <-chan struct{}
	// Usage is from the cgroup, never from the agent. It answers after Done too, until Release or Remove: then ErrNotRunning.
	Usage() (spec.Usage, error)
	// Facts are fixed for the life of the instance.
	Facts() Facts
}

// CleanKiller is an Instance that loses nothing by Kill: what its processes have written is the host's kernel's to keep, so
// that nobody need ask its agent to write anything back first.
type CleanKiller interface {
	Instance
	// KillLosesNothing does nothing.
	KillLosesNothing()
}

// Networker is an instance whose sandbox can be joined to networks: it was started with one in its spec.Sandbox. Both
// methods are called once, in this order, before anything runs in the sandbox.
type Networker interface {
	// NetNS opens the network namespace of this host into which interfaces are to be put. The caller closes it.
	NetNS() (*os.File, error)
	// Connect has the sandbox use the interface that is there now. What it makes is in the namespace or of the instance, and
	// goes with them.
	Connect(n spec.Network) error
}

// ConsoleKeeper is a Runtime whose sandboxes have a kernel and a monitor of their own, and which keeps what those say in the
// file that spec.Sandbox names.
type ConsoleKeeper interface {
	Runtime
	// ReadConsole calls fn with each line of such a file, the oldest first, until fn answers with an error, which is then its
	// own. A file that is not there has none. The sandbox may be there or gone.
	ReadConsole(path string, fn func(at time.Time, line string) error) error
}

// OwnKernel is an Instance whose processes have a kernel of their own, so that memory can run out in two places: that
// kernel's, of which only the agent can tell, and the limit of the host's cgroup, which then ends the sandbox's own host
// processes. What the agent says of memory is about its kernel's, and never about the host's.
type OwnKernel interface {
	Instance
	// HasOwnKernel does nothing.
	HasOwnKernel()
}

// Adopter is an Instance whose processes run on this host's kernel: what Dial answers with is a Unix socket, over which its
// agent can be handed descriptors. No descriptor is taken from it.
type Adopter interface {
	// Adopt makes a pipe the sandbox's own, by its owner: its root may then give it to whoever is to write to it.
	Adopt(pipe *os.File) error
}

// Explainer is an instance that can say why it ended.
type Explainer interface {
	// Why is one sentence, once Done is closed; empty if nothing is known. Parts of it come from inside: it is bounded and
	// holds nothing that a terminal would obey, but it may lie.
	Why() string
}

// Facts are what a status shows of an instance.
type Facts struct {
	// Of the first host process: the agent's or QEMU's.
	HostPID int
	// "kvm" or "tcg"; empty where there is no VMM.
	Accelerator string
	// How Dial reaches the agent: "unix", "vsock", "vhost-user-vsock", "virtio-serial".
	AgentTransport string
	// The host's first of the 65,536 user and group ids that are 0 and up in the sandbox; 0 where it has a kernel of its own.
	IDBase uint32
	// The AppArmor profile its processes are to run under, loaded; empty where there is none.
	AppArmorProfile string
	// "cold", "template" or "pool"; empty where there is only one way.
	StartedFrom string
	// One sentence, where there was a template or a pool and it could not be used.
	StartNote string
}

// LimitChecker is a Runtime that knows limits which not every host can enforce.
type LimitChecker interface {
	// CheckLimits refuses what no sandbox on this host can be held to, with the reason: KindWrongState, reason UNSATISFIABLE.
	CheckLimits(r spec.Resources) error
}

// Updater is an Instance whose limits can be changed while it runs. One caller at a time.
type Updater interface {
	// CheckUpdate refuses, before anything is recorded or changed, what cannot be changed to now: KindWrongState. now are the
	// limits it was started with or last updated to.
	CheckUpdate(now, to spec.Resources) error
	// Update brings the limits to what to says. Idempotent; after an error some may have been changed.
	Update(ctx context.Context, to spec.Resources) error
}

// Pauser is an Instance that can be made to stand still, the agent included: whoever pauses it must expect no answer
// from that. It stays paused when the daemon ends.
type Pauser interface {
	// Pause returns when nothing of the sandbox runs; after an error it goes on. Idempotent. A paused sandbox can be killed
	// and removed.
	Pause(ctx context.Context) error
	// Resume lets it go on. Idempotent.
	Resume() error
}

// Prober is a runtime that can say whether it would work on this host, and why. Every runtime of this repository is one;
// a fake need not be.
type Prober interface {
	// Probe is bounded in time and leaves nothing behind. Its result may be cached for as long as the host is up.
	Probe(ctx context.Context) Availability
}

// Availability is a runtime's answer about its host.
type Availability struct {
	Available bool
	// One sentence, in both cases.
	Reason string
	// The accelerator a sandbox would get, and why that one.
	Accelerator       string
	AcceleratorReason string
	AgentTransport    string
	// Each thing looked at.
	Checks []Check
	// Version of the VMM and path of the guest kernel, where there are such.
	VMMVersion  string
	GuestKernel string
}

// Check is one thing looked at by a Prober, for `sandboxctl doctor`.
type Check struct {
	Name string
	// "ok", "warning" or "failed".
	Result  string
	Finding string
	// What to do; empty when ok.
	Advice string
}
