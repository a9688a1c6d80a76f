package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// mountOptions are the options of an OCI mount, sorted out.
type mountOptions struct {
	attrs uint64   // MOUNT_ATTR_* of the mount
	data  []string // KEY or KEY=VALUE for the file system
	bind  bool
	// Of a bind mount: what lies below too.
	recursive bool
}

// mountFlags are the options that mean an attribute of the mount, set or cleared. Propagation is left out: every mount of
// the sandbox is private, whatever is asked.
var mountFlags = map[string]struct{ set, clear uint64 }{
	"defaults":    {},
	"ro":          {set: unix.MOUNT_ATTR_RDONLY},
	"rw":          {clear: unix.MOUNT_ATTR_RDONLY},
	"nosuid":      {set: unix.MOUNT_ATTR_NOSUID},
	"suid":        {clear: unix.MOUNT_ATTR_NOSUID},
	"nodev":       {set: unix.MOUNT_ATTR_NODEV},
	"dev":         {clear: unix.MOUNT_ATTR_NODEV},
	"noexec":      {set: unix.MOUNT_ATTR_NOEXEC},
	"exec":        {clear: unix.MOUNT_ATTR_NOEXEC},
	"noatime":     {set: unix.MOUNT_ATTR_NOATIME, clear: unix.MOUNT_ATTR__ATIME},
	"relatime":    {set: unix.MOUNT_ATTR_RELATIME, clear: unix.MOUNT_ATTR__ATIME},
	"strictatime": {set: unix.MOUNT_ATTR_STRICTATIME, clear: unix.MOUNT_ATTR__ATIME},
	"nodiratime":  {set: unix.MOUNT_ATTR_NODIRATIME},
	"nosymfollow": {set: unix.MOUNT_ATTR_NOSYMFOLLOW},
	"private":     {},
	"rprivate":    {},
}

func parseMountOptions(options []string) mountOptions {
	var o mountOptions
	for _, option := range options {
		switch flag, known := mountFlags[option]; {
		case known:
			o.attrs = o.attrs&^flag.clear | flag.set
		case option == "bind":
			o.bind = true
		case option == "rbind":
			o.bind, o.recursive = true, true
		default:
			o.data = append(o.data, option) // an unknown one is refused by the file system
		}
	}
	return o
}

// newMount makes a file system that is mounted nowhere yet.
func newMount(fstype, source string, o mountOptions) (*os.File, error) {
	fs, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot use file system %s: %w", fstype, err)
	}
	defer unix.Close(fs)
	if source != "" {
		if err := unix.FsconfigSetString(fs, "source", source); err != nil {
			return nil, fsError(fs, fstype, err)
		}
	}
	for _, option := range o.data {
		if key, value, found := strings.Cut(option, "="); found {
			err = unix.FsconfigSetString(fs, key, value)
		} else {
			err = unix.FsconfigSetFlag(fs, key)
		}
		if err != nil {
			return nil, fmt.Errorf("option %s: %w", option, fsError(fs, fstype, err))
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		return nil, fsError(fs, fstype, err)
	}
	fd, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, int(o.attrs))
	if err != nil {
		return nil, fsError(fs, fstype, err)
	}
	return os.NewFile(uintptr(fd), fstype), nil
}

// fsError adds what the kernel says of a failed file system; reading its context gives one message at a time.
func fsError(fs int, fstype string, err error) error {
	message := make([]byte, 512)
	if n, readErr := unix.Read(fs, message); readErr == nil && n > 0 {
		return fmt.Errorf("cannot mount %s: %w (%s)", fstype, err, bytes.TrimSpace(message[:n]))
	}
	return fmt.Errorf("cannot mount %s: %w", fstype, err)
}

// cloneMount makes a bind mount of what f is open on, mounted nowhere yet, with attrs set.
func cloneMount(f *os.File, recursive bool, attrs uint64) (*os.File, error) {
	flags := uint(unix.OPEN_TREE_CLONE | unix.OPEN_TREE_CLOEXEC | unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	fd, err := unix.OpenTree(int(f.Fd()), "", flags)
	if err != nil {
		return nil, fmt.Errorf("cannot clone the mount of %s: %w", f.Name(), err)
	}
	tree := os.NewFile(uintptr(fd), f.Name())
	if err := setMountAttrs(tree, recursive, attrs); err != nil {
		tree.Close()
		return nil, err
	}
	return tree, nil
}

func setMountAttrs(mount *os.File, recursive bool, attrs uint64) error {
	if attrs == 0 {
		return nil
	}
	flags := uint(unix.AT_EMPTY_PATH)
	if recursive {
		flags |= unix.AT_RECURSIVE
	}
	attr := &unix.MountAttr{Attr_set: attrs}
	if attrs&unix.MOUNT_ATTR__ATIME != 0 {
		attr.Attr_clr = unix.MOUNT_ATTR__ATIME
	}
	if err := unix.MountSetattr(int(mount.Fd()), "", flags, attr); err != nil {
		return fmt.Errorf("cannot set attributes of the mount of %s: %w", mount.Name(), err)
	}
	return nil
}

// attach mounts mount over what target is open on. Neither is named by a path, so nothing can be exchanged in between.
func attach(mount, target *os.File) error {
	err := unix.MoveMount(int(mount.Fd()), "", int(target.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return fmt.Errorf("cannot mount at %s: %w", target.Name(), err)
	}
	return nil
}

// makePrivate keeps every mount event of this namespace in it, and every other's out.
func makePrivate() error {
	if weaken.Without("make mounts private") {
		return nil
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot make mounts private: %w", err)
	}
	return nil
}

var errUnsupportedMount = errors.New("this kind of mount is not supported")
