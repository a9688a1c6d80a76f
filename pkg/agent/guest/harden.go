package guest

import (
	"fmt"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// harden makes the agent a poor target for the workload, before the first of its processes starts.
func harden(*specs.Spec) error {
	// Nobody may trace it, read its memory or follow its /proc links. In a container the runtime also gives it a program
	// file that nobody may read, without which root's /proc/1/fd stays open whatever is set here.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot make the agent undumpable: %w", err)
	}
	return nil
}
