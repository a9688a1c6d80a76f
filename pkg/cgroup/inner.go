package cgroup

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"

	"github.com/containerd/cgroups/v3/cgroup1"
	"golang.org/x/sys/unix"
)

// inner is the name of a group within a sandbox's, of the controller pids alone, for all that its workload is. Whatever forks in
// it to its limit takes nothing of what the outer group has beside: the threads that the sandbox's own PID 1 needs.
const inner = "workload"

// innerV1 is that group's directory on v1, innerV2 on v2.
func innerV1(path string) string { return filepath.Join(root, string(cgroup1.Pids), path, inner) }
func innerV2(path string) string { return filepath.Join(root, path, inner) }

// limitInner says how many processes and threads may be in the inner group.
func limitInner(dir string, pids uint32) error {
	return writeFile(filepath.Join(dir, "pids.max"), strconv.FormatUint(uint64(pids), 10))
}

// makeInner makes the inner group on v1.
func (v1) makeInner(path string, l Limits) error {
	if l.InnerPids == 0 {
		return nil
	}
	dir := innerV1(path)
	if err := unix.Mkdir(dir, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("cannot make %s: %w", dir, err)
	}
	return limitInner(dir, l.InnerPids)
}

// makeInner makes the inner group on v2. It is a threaded one (cgroups(7)), so that the outer may have processes too, and threads of
// one process may be in both.
func (v2) makeInner(path string, l Limits) error {
	if l.InnerPids == 0 {
		return nil
	}
	if err := writeFile(filepath.Join(root, path, "cgroup.subtree_control"), "+pids"); err != nil {
		return err
	}
	dir := innerV2(path)
	if err := unix.Mkdir(dir, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("cannot make %s: %w", dir, err)
	}
	if err := writeFile(filepath.Join(dir, "cgroup.type"), "threaded"); err != nil {
		return err
	}
	return limitInner(dir, l.InnerPids)
}

// updateInner changes the limit of an inner group that is there: one that an older daemon made has none.
func updateInner(dir string, l Limits) error {
	if l.InnerPids == 0 {
		return nil
	}
	if err := limitInner(dir, l.InnerPids); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (v1) innerDoor(path string) string { return filepath.Join(innerV1(path), "tasks") }
func (v2) innerDoor(path string) string { return filepath.Join(innerV2(path), "cgroup.threads") }

// InnerDoor opens the file through which a thread of the group enters the inner one, by writing "0"; what it forks is there, too.
// The kernel lets it, whoever it is, because the caller could. It is the caller's to close.
func (g *Group) InnerDoor() (*os.File, error) {
	f, err := os.OpenFile(g.h.innerDoor(g.path), os.O_WRONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the cgroup %s: %w", filepath.Join(g.path, inner), err)
	}
	return f, nil
}
