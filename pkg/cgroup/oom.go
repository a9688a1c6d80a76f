package cgroup

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// oomScoreNeutral is what a process has that nobody protects from the kernel's OOM killer, nor offers to it
// (proc_pid_oom_score_adj(5)). Below it is protection.
const oomScoreNeutral = 0

// DropOOMProtection makes a process one like any other when the host is out of memory. A daemon is protected (its unit has
// OOMScoreAdjust), and what it forks inherits that: sandboxes would be spared in place of the host's own services, and of
// the daemon itself. A process that goes sooner than others stays so.
//
// Where the caller has CAP_SYS_RESOURCE the process can, without it, never be protected again.
func DropOOMProtection(pid int) error {
	if err := dropOOMProtection(fmt.Sprintf("/proc/%d/oom_score_adj", pid)); err != nil {
		return fmt.Errorf("cannot drop the OOM protection of process %d: %w", pid, err)
	}
	return nil
}

func dropOOMProtection(path string) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	score, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || score >= oomScoreNeutral {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(strconv.Itoa(oomScoreNeutral))
	return errors.Join(err, f.Close())
}
