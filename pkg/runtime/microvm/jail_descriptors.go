package microvm

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// descriptorsPath is where a jailed process finds its own descriptors, for a while.
const descriptorsPath = "/fd"

// showDescriptors gives a process that runs in a jail a directory of its own descriptors there, and of nothing else: QEMU
// takes a guest's memory by path only, and a sealed file has no other. It is the process's own part of /proc, which is there
// only once the process is; so QEMU waits for a connection to its monitor before it opens its memory.
func showDescriptors(p process, pidfd *os.File) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, fmt.Sprintf("/proc/%d/fd", p.PID), unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("cannot take the descriptors of process %d: %w", p.PID, err)
	}
	defer unix.Close(tree) //nolint:errcheck // only to mount it
	attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, attr); err != nil {
		return fmt.Errorf("cannot protect the descriptors of process %d: %w", p.PID, err)
	}
	err = inJail(pidfd, func() error {
		return unix.MoveMount(tree, "", unix.AT_FDCWD, descriptorsPath, unix.MOVE_MOUNT_F_EMPTY_PATH)
	})
	if err != nil {
		return fmt.Errorf("cannot show process %d its descriptors: %w", p.PID, err)
	}
	return nil
}

// hideDescriptors takes them away again, before a guest runs that may take QEMU over: a descriptor that only reads can't be
// opened anew there.
func hideDescriptors(pidfd *os.File) error {
	if err := inJail(pidfd, func() error { return unix.Unmount(descriptorsPath, unix.MNT_DETACH) }); err != nil {
		return fmt.Errorf("cannot take its descriptors away from QEMU: %w", err)
	}
	return nil
}

// inJail runs fn with the root and the mounts of the process that pidfd is of, on a thread that ends with it.
func inJail(pidfd *os.File, fn func() error) error {
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread must serve nothing else
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			done <- err
			return
		}
		var enterErr error
		err := conn.Control(func(fd uintptr) { enterErr = unix.Setns(int(fd), unix.CLONE_NEWNS) })
		if err = errors.Join(err, enterErr); err == nil {
			err = fn()
		}
		done <- err
	}()
	return <-done
}
