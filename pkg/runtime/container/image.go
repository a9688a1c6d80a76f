package container

import (
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/disk"
)

// imageKey tells image files apart whatever they are called.
type imageKey struct{ dev, ino uint64 }

// imageLinger is how long an image stays mounted after its last sandbox: the next often wants the same.
const imageLinger = 2 * time.Second

// image is one EROFS file mounted in the mounter's namespace while sandboxes started by this daemon use it, and a moment longer:
// one superblock, and so one page cache of its metadata, for all of them.
type image struct {
	key    imageKey
	dir    string // where it is attached
	detach func() error
	users  int
	idle   int // how often users came down to 0
}

// openImage opens an image file such that nobody writes to it through here.
func openImage(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the image: %w", err)
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = errors.New("it is no regular file")
	}
	if err != nil {
		_ = f.Close() // nothing was done with it
		return nil, fmt.Errorf("cannot open the image %s: %w", path, err)
	}
	return f, nil
}

func keyOf(image *os.File) (imageKey, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(image.Fd()), &st); err != nil {
		return imageKey{}, fmt.Errorf("cannot examine the image: %w", err)
	}
	return imageKey{st.Dev, st.Ino}, nil
}

// useImage mounts an image, or finds it mounted, and counts the caller as a user. On the mounter's thread.
func (m *mounter) useImage(file *os.File) (*image, error) {
	key, err := keyOf(file)
	if err != nil {
		return nil, err
	}
	if i, ok := m.images[key]; ok {
		i.users++
		return i, nil
	}
	mount, err := mountEROFS(file)
	if err != nil {
		return nil, err
	}
	defer mount.Close() //nolint:errcheck // attached below
	m.next++
	i := &image{key: key, dir: fmt.Sprintf("/image%d", m.next), users: 1}
	if i.detach, err = attach(mount, i.dir); err != nil {
		return nil, err
	}
	m.images[key] = i
	return i, nil
}

// leaveImage ends one use; some time after the last one it is unmounted. Sandboxes that run have their own clones. On the
// mounter's thread.
func (m *mounter) leaveImage(i *image) {
	if i.users--; i.users > 0 {
		return
	}
	i.idle++
	nth := i.idle
	time.AfterFunc(imageLinger, func() {
		m.doIfRunning(func() {
			if i.users == 0 && i.idle == nth { // nobody came, nor came and went
				delete(m.images, i.key)
				if err := i.detach(); err != nil {
					m.log.Error("cannot unmount an image", zap.Error(err))
				}
			}
		})
	})
}

// mountEROFS mounts an image file as it is where the kernel can (6.12, and the file lies on a file system that allows it),
// else through a read-only loop device.
func mountEROFS(file *os.File) (*os.File, error) {
	const attrs = unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV
	direct, err := mountFS("erofs", attrs, option{"source", fdPath(file)}, option{key: "ro"})
	if err == nil {
		return direct, nil
	}
	var loop *os.File
	lerr := onHost(func() (err error) { loop, err = disk.AttachLoop(file, true); return err })
	if lerr != nil {
		return nil, errors.Join(err, lerr)
	}
	// The mount keeps the device; this descriptor need not.
	defer loop.Close() //nolint:errcheck // nothing was written
	m, lerr := mountFS("erofs", attrs, option{"source", fdPath(loop)}, option{key: "ro"})
	if lerr != nil {
		return nil, fmt.Errorf("cannot mount the image: %w", errors.Join(err, lerr))
	}
	return m, nil
}

// fdPath names a file of the daemon's in the mounter's namespace, where the host's paths are not.
func fdPath(f *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", f.Fd()) }
