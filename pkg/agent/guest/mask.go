package guest

import (
	"fmt"
	"os"
	"path"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// guardedFilesystems are what masked and read-only paths must lie on: a link of the image must not lead a guard away from
// what it is meant to cover.
var guardedFilesystems = []struct {
	prefix string
	magic  int64
}{
	{"/proc/", unix.PROC_SUPER_MAGIC},
	{"/sys/", unix.SYSFS_MAGIC},
}

// openGuarded opens a path to be masked or made read-only; nil if there is nothing by that name.
func (r *rootfs) openGuarded(name string) (*os.File, error) {
	name = path.Clean("/" + name)
	for _, g := range guardedFilesystems {
		if !strings.HasPrefix(name, g.prefix) {
			continue
		}
		f, err := openIn(r.dir, name, unix.O_PATH, unix.RESOLVE_NO_SYMLINKS)
		if isMissing(err) {
			return nil, nil
		}
		if err != nil {
			return nil, err
		}
		// Other file systems may be mounted further down (binfmt_misc, cgroup); its first component decides.
		top, err := openIn(r.dir, g.prefix, unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_NO_SYMLINKS)
		if err == nil {
			if err = checkFilesystem(top, g.magic); weaken.Without("check that proc is proc") {
				err = nil
			}
			top.Close()
		}
		if err != nil {
			f.Close()
			return nil, err
		}
		return f, nil
	}
	f, err := openIn(r.dir, name, unix.O_PATH, 0)
	if isMissing(err) {
		return nil, nil
	}
	return f, err
}

func (r *rootfs) readonlyPaths() error {
	for _, name := range r.config.Linux.ReadonlyPaths {
		target, err := r.openGuarded(name)
		if err != nil {
			return err
		}
		if target == nil {
			continue
		}
		err = r.readonlyPath(target)
		target.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	return nil
}

func (r *rootfs) readonlyPath(target *os.File) error {
	mount, err := cloneMount(target, true, unix.MOUNT_ATTR_RDONLY)
	if err != nil {
		return err
	}
	defer mount.Close()
	return attach(mount, target)
}

// maskedPaths lays /dev/null over files and an empty read-only directory over directories.
func (r *rootfs) maskedPaths() error {
	var empty *os.File
	for _, name := range r.config.Linux.MaskedPaths {
		target, err := r.openGuarded(name)
		if err != nil {
			return err
		}
		if target == nil {
			continue
		}
		err = r.maskPath(target, &empty)
		target.Close()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
	}
	if empty != nil {
		return empty.Close()
	}
	return nil
}

// maskPath covers target. All directories share one empty file system, made for the first of them.
func (r *rootfs) maskPath(target *os.File, empty **os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(target.Fd()), &st); err != nil {
		return fmt.Errorf("cannot examine it: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		if err := checkNode(r.null, nullNode); err != nil {
			return err
		}
		return r.cover(r.null, target)
	}
	if *empty != nil {
		return r.cover(*empty, target)
	}
	mount, err := newMount("tmpfs", "tmpfs", mountOptions{
		attrs: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC,
		data:  []string{"size=4k", "mode=555"},
	})
	if err != nil {
		return err
	}
	*empty = mount
	return attach(mount, target) // the descriptor stays open on it, now to be cloned
}

func (r *rootfs) cover(with, target *os.File) error {
	mount, err := cloneMount(with, false, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return err
	}
	defer mount.Close()
	return attach(mount, target)
}
