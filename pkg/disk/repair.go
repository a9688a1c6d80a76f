package disk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Of ext4's superblock (Documentation/filesystems/ext4/super.rst): it starts at byte 1024, its s_magic lies at 0x38 and
// its s_state at 0x3A; bit 0 of the state is set while the file system is cleanly unmounted, bit 1 once errors were seen.
const (
	superOffset = 1024
	magicOffset = 0x38
	extMagic    = 0xEF53
	stateClean  = 1
	stateErrors = 2
)

// Repair makes a layer that was not unmounted cleanly (its host crashed, or its VM was killed) consistent again, as far
// as e2fsck can without asking. It costs one read where there is nothing to do. The layer must not be in use.
func Repair(ctx context.Context, path string) error {
	clean, err := isClean(path)
	if err != nil {
		return fmt.Errorf("cannot examine the writable layer: %w", err)
	}
	if clean {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, fsckTimeout)
	defer cancel()
	err = run(ctx, "e2fsck", "-p", "-f", path)
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.ExitCode() == 1 {
		return nil // errors found and corrected
	}
	if err != nil {
		return fmt.Errorf("cannot repair the writable layer; delete the workload to start afresh: %w", err)
	}
	return nil
}

func isClean(path string) (bool, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return false, err
	}
	defer f.Close() //nolint:errcheck // only read
	var super [64]byte
	if _, err := f.ReadAt(super[:], superOffset); err != nil {
		return false, err
	}
	if binary.LittleEndian.Uint16(super[magicOffset:]) != extMagic {
		return false, spec.Errorf(spec.KindInternal, "%s is no ext4 file system", path)
	}
	state := binary.LittleEndian.Uint16(super[magicOffset+2:])
	return state&stateClean != 0 && state&stateErrors == 0, nil
}
