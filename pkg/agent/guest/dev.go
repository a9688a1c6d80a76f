package guest

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// node is a character device.
type node struct {
	name         string
	major, minor uint32
	reason       string
}

var nullNode = node{"null", 1, 3, "programs read nothing from it and write nothing to it; masks files"}

// nodes are the devices of every container: the ones of the OCI runtime-spec. All are harmless to share.
var nodes = []node{
	nullNode,
	{"zero", 1, 5, "zeros to read"},
	{"full", 1, 7, "programs test against a full disk"},
	{"random", 1, 8, "the kernel's random generator"},
	{"urandom", 1, 9, "the same"},
	{"tty", 5, 0, "whatever terminal the opener has"},
}

// devLinks are what programs expect beside the nodes.
var devLinks = []struct{ name, target string }{
	{"fd", "/proc/self/fd"},
	{"stdin", "/proc/self/fd/0"},
	{"stdout", "/proc/self/fd/1"},
	{"stderr", "/proc/self/fd/2"},
	{"ptmx", "pts/ptmx"},
}

func (r *rootfs) makeDevices() error {
	dev, err := openIn(r.dir, "/dev", unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return err
	}
	defer dev.Close()
	for _, n := range nodes {
		if err := bindNode(r.oldDev, dev, n); err != nil {
			return err
		}
		made, err := openIn(r.dir, "/dev/"+n.name, unix.O_PATH, unix.RESOLVE_NO_SYMLINKS)
		if err != nil {
			return err
		}
		err = checkNode(made, n)
		if n == nullNode && err == nil {
			r.null = made
			continue
		}
		made.Close()
		if err != nil {
			return err
		}
	}
	for _, link := range devLinks {
		if err := unix.Symlinkat(link.target, int(dev.Fd()), link.name); err != nil {
			return fmt.Errorf("cannot link %s: %w", link.name, err)
		}
	}
	return nil
}

// checkNode makes sure that f is the device it should be: a mask that is a bind mount of something else hides nothing and
// may show much (CVE-2025-31133).
func checkNode(f *os.File, n node) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("cannot examine %s: %w", f.Name(), err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFCHR || st.Rdev != unix.Mkdev(n.major, n.minor) {
		return fmt.Errorf("%s is not the device %d:%d", f.Name(), n.major, n.minor)
	}
	return nil
}

// bindNode puts a node of the agent's old /dev into dev. A user namespace may not make nodes, but those of others work in
// it; and where making them is allowed, in a guest, dev is mounted nodev, so that those the workload makes don't work.
func bindNode(oldDev, dev *os.File, n node) error {
	source, err := openIn(oldDev, n.name, unix.O_PATH, unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return fmt.Errorf("cannot find the kernel's %s: %w", n.name, err)
	}
	defer source.Close()
	if err := checkNode(source, n); err != nil {
		return err
	}
	if err := unix.Mknodat(int(dev.Fd()), n.name, unix.S_IFREG, 0); err != nil {
		return fmt.Errorf("cannot make a place for %s: %w", n.name, err)
	}
	target, err := openIn(dev, n.name, unix.O_PATH, unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return err
	}
	defer target.Close()
	mount, err := cloneMount(source, false, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return err
	}
	defer mount.Close()
	return attach(mount, target)
}
