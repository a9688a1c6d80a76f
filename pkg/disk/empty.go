package disk

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Occupied is what a layer's file system has free, and what its file occupies.
type Occupied struct {
	FreeBlocks, FreeInodes uint64 // of the file system
	HostBytes              uint64 // of the file, on the host's disk
	Writable               bool   // an error makes the kernel take that away
}

// Occupies examines a layer through a mount of it, and its file at path.
func Occupies(mount *os.File, path string) (Occupied, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(mount.Fd()), &st); err != nil {
		return Occupied{}, fmt.Errorf("cannot examine a writable layer: %w", err)
	}
	used, _, err := Usage(path)
	if err != nil {
		return Occupied{}, err
	}
	return Occupied{FreeBlocks: st.Bfree, FreeInodes: st.Ffree, HostBytes: used, Writable: st.Flags&unix.ST_RDONLY == 0}, nil
}

// ErrNotEmptied: a layer holds more than it was worth deleting.
var ErrNotEmptied = errors.New("it holds too much")

// Empty brings a layer that nobody uses any more back to what Create makes: its directories upper and work are new and empty, and
// there is nothing else but lost+found. It deletes at most limit files and directories, below directories of the layer's own
// only. mount is a mount of it.
func Empty(mount *os.File, limit int) error {
	fd, err := unix.Openat(int(mount.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot empty a writable layer: %w", err)
	}
	top := os.NewFile(uintptr(fd), "layer")
	defer top.Close() //nolint:errcheck // only read
	for dir, mode := range map[string]uint32{upperDir: upperMode, workDir: workMode} {
		err := removeAt(top, dir, &limit)
		if err == nil {
			err = unix.Mkdirat(fd, dir, mode)
		}
		if err == nil {
			err = unix.Fchmodat(fd, dir, mode, 0) // whatever the umask
		}
		if err != nil {
			return fmt.Errorf("cannot empty a writable layer: %w", err)
		}
	}
	return nil
}

// removeAt deletes a file or a directory with all in it. No link is followed: each directory is opened by its last name, in one
// that is open.
func removeAt(dir *os.File, name string, limit *int) error {
	if *limit--; *limit < 0 {
		return ErrNotEmptied
	}
	err := unix.Unlinkat(int(dir.Fd()), name, 0)
	if err == nil || !errors.Is(err, unix.EISDIR) {
		return err
	}
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	below := os.NewFile(uintptr(fd), name)
	defer below.Close() //nolint:errcheck // only read
	for {
		names, err := below.Readdirnames(*limit + 1)
		for _, n := range names {
			if err := removeAt(below, n, limit); err != nil {
				return err
			}
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, io.EOF) {
			return err
		}
		return unix.Unlinkat(int(dir.Fd()), name, unix.AT_REMOVEDIR)
	}
}
