package network

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"golang.org/x/sys/unix"
)

// pin keeps a network namespace at path for as long as the host is up, or until unpin.
func pin(netns *os.File, path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return fmt.Errorf("cannot pin the network namespace: %w", err)
	}
	_ = f.Close() // only to mount on
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", netns.Fd()), path, "", unix.MS_BIND, ""); err != nil {
		return errors.Join(fmt.Errorf("cannot pin the network namespace: %w", err), os.Remove(path))
	}
	return nil
}

// pinned reports whether a namespace is held at path. A plain file is what is left of a pin after a daemon died in pin.
func pinned(path string) (bool, error) {
	var st unix.Statfs_t
	err := unix.Statfs(path, &st)
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("cannot examine the pin of a network namespace: %w", err)
	}
	return st.Type == unix.NSFS_MAGIC, nil
}

// unpin lets go of what is held at path, whatever state it is in.
func unpin(path string) error {
	for {
		held, err := pinned(path)
		if err != nil {
			return err
		}
		if !held {
			break
		}
		if err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("cannot unpin a network namespace: %w", err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove the pin of a network namespace: %w", err)
	}
	return nil
}
