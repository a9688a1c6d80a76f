package container

import (
	"fmt"
	"os"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

var _ runtime.Networker = (*instance)(nil)

// NetNS is the agent's own, made with its clone and so owned by the sandbox's user namespace: sysfs can be mounted in it, and
// who has CAP_NET_ADMIN in the sandbox has it over this one namespace. The interface's other end is out of its reach.
func (i *instance) NetNS() (*os.File, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", i.rec.PID))
	if ended(i.pidfd) { // then the number may have been another's
		if err == nil {
			_ = f.Close() // only looked at
		}
		return nil, runtime.ErrNotRunning
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open the sandbox's network namespace: %w", err)
	}
	return f, nil
}

// Connect has nothing to do: the interface is where the workload will be.
func (*instance) Connect(spec.Network) error { return nil }
