package guest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

const (
	// diskWait bounds the wait for a disk. The kernel finds them while the agent starts; under emulation that may be later.
	diskWait = 10 * time.Second
	// diskInterval is how often the agent looks.
	diskInterval = time.Millisecond
)

// Directories of the initramfs that the root is put together from.
const (
	imageDir = "/image"
	diskDir  = "/disk"
	rootDir  = "/root"
)

// mountRoot mounts the image, the writable layer and the overlay of both. They stay below the container's root, where no
// name leads.
func (w *vmWall) mountRoot() (*os.File, error) {
	for _, m := range []struct {
		serial, fstype, dir string
		attrs               uint64
		reason              string
	}{
		{w.boot.ImageSerial, "erofs", imageDir, unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV, "the image; the drive is read-only on the host's side too"},
		{w.boot.DiskSerial, "ext4", diskDir, unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_RELATIME, "the writable layer"},
	} {
		if weaken.Without("nodev") {
			m.attrs &^= unix.MOUNT_ATTR_NODEV
		}
		device, err := findDisk(m.serial)
		if err != nil {
			return nil, err
		}
		if err := mountAt(m.fstype, device, m.dir, mountOptions{attrs: m.attrs, data: readonlyData(m.attrs)}); err != nil {
			return nil, err
		}
	}
	var err error
	if w.disk, err = openDir(diskDir); err != nil {
		return nil, err
	}
	if err := prepareUpper(imageDir, diskDir); err != nil {
		return nil, err
	}
	overlay := mountOptions{
		attrs: unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_RELATIME,
		data:  []string{"lowerdir=" + imageDir, "upperdir=" + diskDir + "/upper", "workdir=" + diskDir + "/work"},
	}
	if weaken.Without("nodev") {
		overlay.attrs &^= unix.MOUNT_ATTR_NODEV
	}
	if err := mountAt("overlay", "overlay", rootDir, overlay); err != nil {
		return nil, err
	}
	return openDir(rootDir)
}

// prepareUpper gives a writable layer that was never used the owner and mode of the image's root, which an overlay takes from
// its upper directory. The first overlay leaves something in its work directory.
func prepareUpper(image, disk string) error {
	used, err := os.ReadDir(disk + "/work")
	if err != nil {
		return fmt.Errorf("cannot examine the writable layer: %w", err)
	}
	if len(used) > 0 {
		return nil
	}
	var st unix.Stat_t
	if err := unix.Stat(image, &st); err != nil {
		return fmt.Errorf("cannot examine the image's root: %w", err)
	}
	upper := disk + "/upper"
	if err := unix.Chown(upper, int(st.Uid), int(st.Gid)); err != nil {
		return fmt.Errorf("cannot prepare the writable layer: %w", err)
	}
	if err := unix.Chmod(upper, st.Mode&0o7777); err != nil {
		return fmt.Errorf("cannot prepare the writable layer: %w", err)
	}
	return nil
}

// settleDisk makes the writable layer's file system read-only, so that everything is on the drive and the file system says
// of itself that it was left in order. It can't be unmounted: the agent lives in the overlay over it.
func (w *vmWall) settleDisk() error {
	if w.disk == nil {
		return nil
	}
	fs, err := unix.Fspick(int(w.disk.Fd()), "", unix.FSPICK_EMPTY_PATH|unix.FSPICK_CLOEXEC)
	if err != nil {
		return fmt.Errorf("cannot pick the writable layer: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigSetFlag(fs, "ro"); err != nil {
		return fsError(fs, "ext4", err)
	}
	if err := unix.FsconfigReconfigure(fs); err != nil {
		return fmt.Errorf("cannot make the writable layer read-only: %w", fsError(fs, "ext4", err))
	}
	return nil
}

// readonlyData makes the file system itself read-only, not only this mount of it: EROFS insists where the drive is.
func readonlyData(attrs uint64) []string {
	if attrs&unix.MOUNT_ATTR_RDONLY != 0 {
		return []string{"ro"}
	}
	return nil
}

func mountAt(fstype, source, dir string, o mountOptions) error {
	if err := unix.Mkdir(dir, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("cannot make %s: %w", dir, err)
	}
	target, err := openDir(dir)
	if err != nil {
		return err
	}
	defer target.Close()
	mount, err := newMount(fstype, source, o)
	if err != nil {
		return err
	}
	defer mount.Close()
	return attach(mount, target)
}

// findDisk waits for the block device with a virtio-blk serial number and answers with its node in /dev.
func findDisk(serial string) (string, error) {
	if serial == "" {
		return "", errors.New("cannot find a disk without a serial number")
	}
	for deadline := time.Now().Add(diskWait); ; time.Sleep(diskInterval) {
		files, err := filepath.Glob("/sys/block/*/serial")
		if err != nil {
			return "", err
		}
		for _, file := range files {
			found, err := os.ReadFile(file)
			if err != nil || strings.TrimSpace(string(found)) != serial {
				continue
			}
			node := "/dev/" + filepath.Base(filepath.Dir(file))
			if _, err := os.Lstat(node); err == nil {
				return node, nil
			}
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("cannot find the disk with serial number %q: it did not come up in %v", serial, diskWait)
		}
	}
}
