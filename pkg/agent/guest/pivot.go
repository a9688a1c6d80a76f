package guest

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// pivotInto makes dir, the root of a mount, the root of the agent's mount namespace and lets go of the old one, of which
// nothing stays reachable. Every thread of the agent moves along: they share one root.
func pivotInto(dir *os.File) error {
	if err := unix.Fchdir(int(dir.Fd())); err != nil {
		return fmt.Errorf("cannot go there: %w", err)
	}
	// With both arguments the same the old root comes to lie over the new one, and no directory is needed for it.
	if err := unix.PivotRoot(".", "."); err != nil {
		return fmt.Errorf("cannot exchange roots: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return fmt.Errorf("cannot let go of the old root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("cannot go to the new root: %w", err)
	}
	return nil
}

// moveInto is pivotInto where the old root is the initramfs, which can't be exchanged: the new root is moved over it.
func moveInto(dir *os.File) error {
	if err := unix.Fchdir(int(dir.Fd())); err != nil {
		return fmt.Errorf("cannot go there: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("cannot move the new root over the old: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("cannot change the root: %w", err)
	}
	if err := unix.Chdir("/"); err != nil {
		return fmt.Errorf("cannot go to the new root: %w", err)
	}
	return nil
}
