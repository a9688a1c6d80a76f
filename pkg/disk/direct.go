package disk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// A layer is a file of the host's, so what a sandbox writes would wait in the host's page cache, as pages of a file that the
// daemon wrote first: the kernel counts a file's put-off writes to whom it saw write first, and no limit of the sandbox's cgroup
// holds them. Written directly they are the sandbox's: a loop device works for each cgroup apart, and QEMU is in its own.

// ioctlSetDirectIO is LOOP_SET_DIRECT_IO of linux/loop.h.
const ioctlSetDirectIO = 0x4C08

// CheckDirect refuses a directory whose file system has no direct I/O: a limit of writes would not hold there.
func CheckDirect(dir string) error {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, unix.EINVAL) {
		return noDirect(dir)
	}
	if err != nil {
		return fmt.Errorf("cannot see whether %s has direct I/O: %w", dir, err)
	}
	return unix.Close(fd)
}

func noDirect(path string) error {
	return spec.Errorf(spec.KindWrongState, "cannot limit what is written to %s: its file system or disk takes no direct I/O in blocks of 512 bytes; leave io_write_* out, or put the state directory onto ext4 or xfs",
		path).WithReason(spec.ReasonUnsatisfiable)
}

// SetLoopDirect has an attached loop device write past the host's page cache, or again through it. What waits there is written
// first.
func SetLoopDirect(loop *os.File, direct bool) error {
	err := unix.IoctlSetInt(int(loop.Fd()), ioctlSetDirectIO, map[bool]int{false: 0, true: 1}[direct])
	if errors.Is(err, unix.EINVAL) {
		return noDirect(loop.Name())
	}
	if err != nil {
		return fmt.Errorf("cannot set whether %s writes directly: %w", loop.Name(), err)
	}
	return nil
}

// SetLayerDirect is SetLoopDirect for the loop device that has the layer at path behind it.
func SetLayerDirect(path string, direct bool) error {
	name, err := loopOf(path)
	if err != nil {
		return fmt.Errorf("cannot find the loop device of %s: %w", path, err)
	}
	if name == "" {
		return fmt.Errorf("cannot find the loop device of %s: it is on none", path)
	}
	loop, err := os.OpenFile(filepath.Join("/dev", name), os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open a loop device: %w", err)
	}
	defer loop.Close() //nolint:errcheck // nothing is written to it
	return SetLoopDirect(loop, direct)
}
