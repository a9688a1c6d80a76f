package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

const (
	// freezeLimit bounds the wait until every process stands still: one in an uninterruptible sleep does so when that is over.
	freezeLimit = 10 * time.Second
	// freezePause is between two looks.
	freezePause = time.Millisecond
)

var errNoFreezer = errors.New("the workload has no cgroup of this kernel's to freeze")

// Freeze implements agentv1.AgentServiceService.
func (s *Service) Freeze(ctx context.Context, r *agentv1.FreezeRequest) (*agentv1.FreezeResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.container == nil {
		return nil, wrongState("the sandbox has no container yet")
	}
	ctx, cancel := context.WithTimeout(ctx, freezeLimit)
	defer cancel()
	switch err := s.wall.freeze(ctx, r.Frozen); {
	case errors.Is(err, errNoFreezer):
		return nil, wrongState("%v", err)
	case err != nil:
		return nil, internal("cannot freeze the workload: %v", err)
	}
	return &agentv1.FreezeResponse{}, nil
}

// freeze implements wall. After an error the processes go on.
func (s *stages) freeze(ctx context.Context, frozen bool) error {
	if s.cgroup == nil {
		return errNoFreezer
	}
	value, want := "0", []byte("frozen 0\n")
	if frozen {
		value, want = "1", []byte("frozen 1\n")
	}
	if err := writeCgroup(s.cgroup, "cgroup.freeze", value); err != nil {
		return err
	}
	for {
		events, err := readCgroup(s.cgroup, "cgroup.events")
		if err == nil && bytes.Contains(events, want) {
			return nil
		}
		if err == nil && ctx.Err() != nil {
			err = fmt.Errorf("not every process does in time: %w", ctx.Err())
		}
		if err != nil {
			if frozen {
				err = errors.Join(err, writeCgroup(s.cgroup, "cgroup.freeze", "0"))
			}
			return err
		}
		time.Sleep(freezePause)
	}
}

// readCgroup reads a small file of a cgroup.
func readCgroup(dir *os.File, name string) ([]byte, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", name, err)
	}
	defer unix.Close(fd)
	b := make([]byte, 4096)
	n, err := ignoringEINTR(func() (int, error) { return unix.Read(fd, b) })
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", name, err)
	}
	return b[:n], nil
}

// machineIDLen is that of machine-id(5) without its line feed.
const machineIDLen = 32

func checkMachineID(id string) error {
	if id == "" {
		return nil
	}
	if len(id) != machineIDLen {
		return fmt.Errorf("a machine id has %d digits, not %d", machineIDLen, len(id))
	}
	for _, c := range []byte(id) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return fmt.Errorf("%q is no digit of a machine id", c)
		}
	}
	return nil
}

// rename writes the files of a container that say who it is, which was somebody else. Its processes are frozen, but what they
// made of those files counts: names are resolved within the root, and a root that refuses writes keeps them.
func (c *container) rename(hostname, machineID string) error {
	r := &rootfs{config: &specs.Spec{Hostname: hostname}, dir: c.root.dir}
	err := r.writeEtc()
	if err == nil && machineID != "" && r.hasMachineID() {
		if err = r.writeFile("/etc/machine-id", machineID+"\n"); err != nil {
			err = fmt.Errorf("/etc/machine-id: %w", err)
		}
	}
	if errors.Is(err, unix.EROFS) {
		return nil
	}
	return err
}

// hasMachineID: an image without one is given none, and an empty one is for the first boot to fill.
func (r *rootfs) hasMachineID() bool {
	f, err := openIn(r.dir, "/etc/machine-id", unix.O_PATH, 0)
	if err != nil {
		return false
	}
	defer f.Close()
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Size > 0
}
