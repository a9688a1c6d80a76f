package guest

import (
	"context"
	"os"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// wall is what differs between the agent's places: namespaces of the host's kernel, a guest kernel, and a test's own
// process. Its methods but spawn, copy, signal, signalAll and gone are called one at a time.
type wall interface {
	// configure takes over the daemon's clock and entropy, and sets up the network, where the kernel is the sandbox's own.
	// Without a network n is nil.
	configure(hostname string, now time.Time, entropy []byte, n *network) error
	// ownClock: the sandbox's clock is not the host's.
	ownClock() bool
	// enter builds the container's root, moves the agent into it and has the agent give up what it no longer needs: every
	// system call but filter's among them. It is called once.
	enter(config *specs.Spec, filter []byte) (*root, error)
	// spawn starts a process with stdio as its descriptors 0 to 2 and answers when it runs. An error that is a
	// *stageFailure is the process's fault. ended is called once the process has ended.
	spawn(c *confined, stdio [3]*os.File, ended func(unix.WaitStatus)) (int, error)
	// copy starts a copy, whose tar stream is descriptor 0 or 1.
	copy(job *copyJob, stdio [3]*os.File, ended func(unix.WaitStatus, string)) (int, error)
	// signal sends a signal to a process, errEnded if it has ended.
	signal(p *process, sig syscall.Signal) error
	// signalAll sends a signal to every process of the sandbox but the agent.
	signalAll(sig syscall.Signal) error
	// sync writes back what the sandbox's own kernel still holds. Where the kernel is the host's, sync(2) would be everybody's
	// business, and unmounting the layer does it.
	sync()
	// oomKills is how many processes the sandbox's own kernel has killed for want of memory; 0 where the kernel is the host's.
	// proc is a procfs of that kernel.
	oomKills(proc *os.File) (uint64, error)
	// freeze holds every process but the agent still, or lets them go on, and answers when that is so: errNoFreezer where it can't.
	freeze(ctx context.Context, frozen bool) error
	// gone reports whether no process but the agent is left.
	gone() bool
}

// root is a container's root as the agent holds it: by descriptors, taken while nothing of the workload ran, so that
// nothing the workload does to its mounts or links leads the agent elsewhere.
type root struct {
	dir  *os.File // the root directory
	proc *os.File // its procfs
	pts  *os.File // its devpts; nil if the config has none
	null *os.File // /dev/null, readable and writable
}
