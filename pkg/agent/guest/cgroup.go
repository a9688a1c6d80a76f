package guest

import (
	"errors"
	"fmt"
	"os"
	"strconv"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// stageThreads is how many threads there may be on top of the processes the workload may have: a copy is a Go program,
// and a child is one more until it is the workload. A container's cgroup allows for the same.
const stageThreads = 16

// workloadCgroup makes the cgroup of a guest's workload and answers with its directory, nil if the config limits nothing
// that a guest's kernel must. Its hierarchy is mounted nowhere: a workload finds none. The agent itself stays outside.
func workloadCgroup(config *specs.Spec) (*os.File, error) {
	limit := pidsLimit(config)
	if limit <= 0 {
		return nil, nil
	}
	root, err := newMount("cgroup2", "cgroup2", mountOptions{})
	if err != nil {
		return nil, err
	}
	defer root.Close()
	controllers := "+pids"
	if oomGroup(config) {
		controllers += " +memory"
	}
	if err := writeCgroup(root, "cgroup.subtree_control", controllers); err != nil {
		return nil, fmt.Errorf("cannot limit processes, does the guest's kernel lack the controllers %s? %w", controllers, err)
	}
	const name = "workload"
	if err := unix.Mkdirat(int(root.Fd()), name, 0o755); err != nil {
		return nil, fmt.Errorf("cannot make the workload's cgroup: %w", err)
	}
	fd, err := unix.Openat(int(root.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the workload's cgroup: %w", err)
	}
	dir := os.NewFile(uintptr(fd), "cgroup")
	if err := writeCgroup(dir, "pids.max", strconv.FormatInt(limit+stageThreads, 10)); err != nil {
		return nil, errors.Join(err, dir.Close())
	}
	if oomGroup(config) {
		if err := writeCgroup(dir, oomGroupFile, "1"); err != nil {
			return nil, errors.Join(err, dir.Close())
		}
	}
	return dir, nil
}

// oomGroupFile says that all of a group's processes are killed when the kernel chooses one of them for want of memory.
const oomGroupFile = "memory.oom.group"

func oomGroup(config *specs.Spec) bool {
	return config.Linux != nil && config.Linux.Resources != nil && config.Linux.Resources.Unified[oomGroupFile] == "1"
}

func pidsLimit(config *specs.Spec) int64 {
	if config.Linux == nil || config.Linux.Resources == nil || config.Linux.Resources.Pids == nil || config.Linux.Resources.Pids.Limit == nil {
		return 0
	}
	return *config.Linux.Resources.Pids.Limit
}

func writeCgroup(dir *os.File, name, value string) error {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open %s: %w", name, err)
	}
	defer unix.Close(fd)
	if _, err := unix.Write(fd, []byte(value)); err != nil {
		return fmt.Errorf("cannot write %q to %s: %w", value, name, err)
	}
	return nil
}
