package runtimetest

import (
	"context"
	"io"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// scenarioTimeout bounds one scenario: some boots of an emulated guest on a machine that does other things too.
	scenarioTimeout = 5 * time.Minute
	// endTimeout is how long a killed sandbox may take until its last host process has gone.
	endTimeout = 30 * time.Second
	// defaultParallel is how many sandboxes start at once.
	defaultParallel = 4
)

// Factory makes what the suite tests.
type Factory struct {
	// Isolation is what the runtime gives: workloads are configured for it.
	Isolation spec.Isolation
	// New makes a Runtime whose files are all below dir, as a daemon does when it starts. Called again with the same dir, it
	// is the next daemon after the death of the first. If the Runtime is an io.Closer, the suite closes it.
	New func(t *testing.T, dir string) runtime.Runtime
	// Parallel is how many sandboxes are started at once; 0 is a few.
	Parallel int
	// NoWalls says that processes see the host's files and network: scenarios about walls are left out. For a fake.
	NoWalls bool
}

// scenario is one thing every runtime must do.
type scenario struct {
	name string
	why  string
	run  func(*host)
	// Whether it is about the wall.
	wall bool
}

var scenarios = []scenario{
	{"Lifecycle", "start, run a process to its exit code, remove: the way of every workload", lifecycle, false},
	{"FailedStart", "a start that fails leaves nothing, and does not spoil the id", failedStart, false},
	{"CancelledStart", "a caller who goes away leaves nothing", cancelledStart, false},
	{"Restart", "a sandbox outlives its daemon: the next one finds it with its process, unread output and open input", restart, false},
	{"UnknownID", "recovery asks about ids of which nothing is there", unknownID, false},
	{"Kill", "kill ends everything at once, however often it is said", kill, false},
	{"KilledWhileAway", "a sandbox that ended while no daemon looked is seen to have ended, and can be removed", killedWhileAway, false},
	{"RemoveRunning", "remove is the one way to get rid of a sandbox, in any state", removeRunning, false},
	{"Shutdown", "the agent's own end is the sandbox's end", shutdown, false},
	{"Release", "what was written survives a stop, and no removal", release, true},
	{"Parallel", "starts do not get into each other's way, and no sandbox sees what another wrote", parallel, true},
	{"TwoClients", "a lost connection is dialled again while the old one lingers", twoClients, false},
	{"DialGivesUp", "a caller who goes away does not wait for the agent", dialGivesUp, false},
	{"Usage", "what the host counts, and against which limits", usage, true},
	{"DiskLimit", "a sandbox cannot fill the host's disk", diskLimit, true},
	{"Loopback", "without a network there is a loopback interface, up, and nothing else", loopback, true},
	{"Confinement", "a process has what the configuration says and no more, behind either wall", confinement, true},
	{"Facts", "a status says what it is", facts, false},
}

// Run runs every scenario against runtimes made by f.
func Run(t *testing.T, f Factory) {
	t.Helper()
	image := BusyboxImage(t)
	for _, s := range scenarios {
		if s.wall && f.NoWalls {
			continue
		}
		t.Run(s.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), scenarioTimeout)
			defer cancel()
			h := &host{T: t, ctx: ctx, factory: f, dir: t.TempDir(), image: image}
			h.runtime = f.New(t, h.dir)
			t.Cleanup(h.sweep)
			s.run(h)
			if t.Failed() {
				t.Logf("this scenario is here because: %s", s.why)
			}
		})
	}
}

// host is a daemon's place on a host, for one scenario.
type host struct {
	*testing.T
	ctx     context.Context
	factory Factory
	dir     string
	image   string
	runtime runtime.Runtime
	// Of the sandboxes that were started.
	ids []string
}

// restart is the daemon's death and the next one's birth.
func (h *host) restart() {
	h.Helper()
	h.close()
	h.runtime = h.factory.New(h.T, h.dir)
}

func (h *host) close() {
	if c, ok := h.runtime.(io.Closer); ok {
		if err := c.Close(); err != nil {
			h.Errorf("cannot close the runtime: %v", err)
		}
	}
	h.runtime = nil
}

// sweep removes every sandbox, whatever the scenario did, and fails if anything is left of one.
func (h *host) sweep() {
	ctx, cancel := context.WithTimeout(context.Background(), scenarioTimeout)
	defer cancel()
	for _, id := range h.ids {
		if err := h.runtime.Remove(ctx, id); err != nil {
			h.Errorf("cannot remove %s: %v", id, err)
			continue
		}
		for _, left := range leftovers(h.dir, id) {
			h.Errorf("left after Remove: %s", left)
		}
	}
	if ids, err := h.runtime.List(ctx); err != nil || len(ids) > 0 {
		h.Errorf("after everything was removed: List says %v, %v", ids, err)
	}
	h.close()
}
