package container

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// rootfs is what a sandbox's root is made of. All descriptors are the caller's.
type rootfs struct {
	id    string
	image *os.File // the EROFS file
	layer *os.File // a mount of the writable layer, attached nowhere
	// The sandbox's user namespace and the host id of its root.
	userns *os.File
	base   uint32
}

// build makes a detached mount of an overlay: the image, shown with the sandbox's ids, below the writable layer, shown so
// too. On disk both keep the ids the sandbox sees. The image stays in use until leaveImage. On the mounter's thread.
//
// An overlay does everything in its layers with the credentials of whoever made it. The layers know only the sandbox's
// ids, so the maker must have them: as host root the kernel could not make its work directory in the layer, and would
// hand out an overlay that is silently read-only.
func (m *mounter) build(r rootfs) (root *os.File, img *image, err error) {
	img, err = m.useImage(r.image)
	if err != nil {
		return nil, nil, err
	}
	fault.At("container start", "image mounted")
	used := img // what is returned with an error is nil
	defer func() {
		if err != nil {
			m.leaveImage(used)
		}
	}()
	dir := "/" + r.id
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, nil, fmt.Errorf("cannot make a mount point: %w", err)
	}
	// From here on everything attached is for the time of making the overlay only.
	undo := []func() error{func() error { return os.Remove(dir) }}
	defer func() {
		for _, f := range undo {
			err = errors.Join(err, f())
		}
		if err != nil && root != nil {
			_ = root.Close() // the first error counts
			root = nil
		}
	}()

	lower, err := cloneMount(img.dir)
	if err != nil {
		return nil, nil, err
	}
	defer lower.Close() //nolint:errcheck // attached below
	for _, layer := range []struct {
		mount *os.File
		dir   string
		attrs uint64
	}{
		{lower, dir + "/image", unix.MOUNT_ATTR_IDMAP | unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV},
		{r.layer, dir + "/layer", unix.MOUNT_ATTR_IDMAP | unix.MOUNT_ATTR_NODEV},
	} {
		if weaken.Without("nodev") {
			layer.attrs &^= unix.MOUNT_ATTR_NODEV
		}
		if err := setAttr(layer.mount, unix.MountAttr{Attr_set: layer.attrs, Userns_fd: uint64(r.userns.Fd())}); err != nil {
			return nil, nil, fmt.Errorf("cannot show %s with the sandbox's ids: %w", filepath.Base(layer.dir), err)
		}
		detach, err := attach(layer.mount, layer.dir)
		if err != nil {
			return nil, nil, err
		}
		undo = append([]func() error{detach}, undo...)
	}
	fault.At("container start", "layers attached")
	if err := prepareLayer(dir+"/layer", dir+"/image"); err != nil {
		return nil, nil, err
	}
	err = asRootOf(r.base, func() (err error) {
		attrs := unix.MOUNT_ATTR_NODEV
		if weaken.Without("nodev") {
			attrs = 0
		}
		root, err = mountFS("overlay", attrs,
			option{"source", "sandbox"},
			option{"lowerdir", dir + "/image"},
			option{"upperdir", dir + "/layer/upper"},
			option{"workdir", dir + "/layer/work"})
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return root, img, checkWritable(root)
}

// cloneMount makes a second, detached mount of what is attached at dir.
func cloneMount(dir string) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("cannot clone a mount: %w", err)
	}
	return os.NewFile(uintptr(fd), dir), nil
}

// prepareLayer gives a layer that no sandbox has had yet the attributes of the image's root. What tells is the layer itself:
// an overlay makes a directory in its work directory before anything else, and leaves it there. So a daemon may die at any
// instant, and what a sandbox made of its root's attributes is never undone.
func prepareLayer(layer, image string) error {
	work, err := os.ReadDir(layer + "/work")
	if err != nil {
		return fmt.Errorf("cannot examine the writable layer: %w", err)
	}
	if len(work) > 0 {
		return nil
	}
	return copyAttributes(layer+"/upper", image)
}

// copyAttributes gives the directory to the owner and mode of from.
func copyAttributes(to, from string) error {
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return fmt.Errorf("cannot examine the image's root: %w", err)
	}
	if err := unix.Chown(to, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("cannot prepare the writable layer: %w", err)
	}
	if err := unix.Chmod(to, st.Mode&0o7777); err != nil {
		return fmt.Errorf("cannot prepare the writable layer: %w", err)
	}
	return nil
}

// asRootOf runs fn with the file system ids of a sandbox's root, and all capabilities of this thread: the kernel takes
// those over files away when the file system uid stops being 0 (capabilities(7)) and gives them back afterwards.
func asRootOf(base uint32, fn func() error) (err error) {
	if err := unix.Setfsgid(int(base)); err != nil {
		return fmt.Errorf("cannot set the file system gid: %w", err)
	}
	defer func() {
		err = errors.Join(err, unix.Setfsuid(0), unix.Setfsgid(0))
	}()
	if err := unix.Setfsuid(int(base)); err != nil {
		return fmt.Errorf("cannot set the file system uid: %w", err)
	}
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	if err := unix.Capget(&header, &caps[0]); err != nil {
		return fmt.Errorf("cannot read capabilities: %w", err)
	}
	for i := range caps {
		caps[i].Effective = caps[i].Permitted
	}
	if err := unix.Capset(&header, &caps[0]); err != nil {
		return fmt.Errorf("cannot raise capabilities: %w", err)
	}
	return fn()
}

// checkWritable finds out whether the kernel gave what was asked for: an overlay that it cannot write to it makes
// read-only, with no more than a line in its log.
func checkWritable(root *os.File) error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(root.Fd()), &st); err != nil {
		return fmt.Errorf("cannot examine the root file system: %w", err)
	}
	if st.Flags&unix.ST_RDONLY != 0 {
		return errors.New("cannot make a writable root file system: the kernel made the overlay read-only; see dmesg for why")
	}
	return nil
}
