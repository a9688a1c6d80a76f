package guest

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// unpack makes what the tar stream r says below the directory name of root. Names that lead up are refused; links that are
// in the container already are followed, inside its root.
func unpack(root *os.File, name string, r io.Reader) error {
	dest, err := openIn(root, name, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return fmt.Errorf("cannot unpack there: %w", err)
	}
	dest.Close()
	u := &unpacker{root: root, dest: path.Clean(name)}
	stream := tar.NewReader(bufio.NewReaderSize(r, copyBuffer))
	for {
		h, err := stream.Next()
		if errors.Is(err, io.EOF) {
			return u.finish()
		}
		if err != nil {
			return fmt.Errorf("cannot read the tar stream: %w", err)
		}
		if err := u.entry(h, stream); err != nil {
			return fmt.Errorf("cannot unpack %q: %w", h.Name, err)
		}
	}
}

type unpacker struct {
	root *os.File
	dest string
	// Directories get their times last: what is made in them changes them.
	dirs []dirTime
}

type dirTime struct {
	name string
	time time.Time
}

var errLeadsUp = errors.New("its name is absolute or has .. in it")

// inside is the name in root of an entry called name.
func (u *unpacker) inside(name string) (string, error) {
	if path.IsAbs(name) || slices.Contains(strings.Split(name, "/"), "..") || strings.ContainsRune(name, 0) {
		return "", errLeadsUp
	}
	return path.Join(u.dest, name), nil
}

func (u *unpacker) entry(h *tar.Header, content io.Reader) error {
	name, err := u.inside(h.Name)
	if err != nil {
		return err
	}
	if h.Typeflag == tar.TypeXGlobalHeader || name == u.dest {
		return nil // the directory unpacked into keeps what it is
	}
	parent, err := makeDirIn(u.root, path.Dir(name), 0o755, 0)
	if err != nil {
		return err
	}
	defer parent.Close()
	base := path.Base(name)
	if h.Typeflag == tar.TypeDir {
		return u.dir(parent, base, name, h)
	}
	if err := unix.Unlinkat(int(parent.Fd()), base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("cannot replace what is there: %w", err)
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		return u.file(parent, base, h, content)
	case tar.TypeLink:
		return u.link(parent, base, h)
	case tar.TypeSymlink:
		err = unix.Symlinkat(h.Linkname, int(parent.Fd()), base)
	case tar.TypeFifo:
		err = unix.Mknodat(int(parent.Fd()), base, unix.S_IFIFO|0o600, 0)
	case tar.TypeChar:
		err = unix.Mknodat(int(parent.Fd()), base, unix.S_IFCHR|0o600, deviceNumber(h))
	case tar.TypeBlock:
		err = unix.Mknodat(int(parent.Fd()), base, unix.S_IFBLK|0o600, deviceNumber(h))
	default:
		return fmt.Errorf("its type %q is unknown", h.Typeflag)
	}
	if err != nil {
		return err
	}
	return setNodeMeta(parent, base, h)
}

func deviceNumber(h *tar.Header) int { return int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor))) }

func (u *unpacker) dir(parent *os.File, base, name string, h *tar.Header) error {
	err := unix.Mkdirat(int(parent.Fd()), base, 0o700)
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	dir, err := openChild(parent, base, unix.O_RDONLY|unix.O_DIRECTORY)
	if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENOTDIR) {
		// A link to a directory stands for it, and both stay as they are.
		target, err := openIn(u.root, name, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return fmt.Errorf("there is something else by its name: %w", err)
		}
		return target.Close()
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	u.dirs = append(u.dirs, dirTime{name, h.ModTime})
	return setMeta(dir, h)
}

func (u *unpacker) file(parent *os.File, base string, h *tar.Header, content io.Reader) error {
	f, err := openNew(parent, base)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := io.Copy(f, content); err != nil {
		return err
	}
	if err := setMeta(f, h); err != nil {
		return err
	}
	if err := setTimes(parent, base, h.ModTime); err != nil {
		return err
	}
	return f.Close()
}

func openNew(parent *os.File, base string) (*os.File, error) {
	fd, err := unix.Openat(int(parent.Fd()), base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), base), nil
}

// link makes a hard link to another entry of the stream, or to what lies below the same directory already.
func (u *unpacker) link(parent *os.File, base string, h *tar.Header) error {
	to, err := u.inside(h.Linkname)
	if err != nil {
		return fmt.Errorf("link target %q: %w", h.Linkname, err)
	}
	dir, err := openIn(u.root, path.Dir(to), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	return unix.Linkat(int(dir.Fd()), path.Base(to), int(parent.Fd()), base, 0)
}

// setMeta gives an open file or directory its owner, attributes and mode, in the order in which none undoes another: a
// change of owner clears set-user-id bits and file capabilities.
func setMeta(f *os.File, h *tar.Header) error {
	if err := unix.Fchown(int(f.Fd()), h.Uid, h.Gid); err != nil {
		return ownerError(h, err)
	}
	if err := setXattrs(f, h); err != nil {
		return err
	}
	return unix.Fchmod(int(f.Fd()), uint32(h.Mode)&0o7777)
}

// setNodeMeta is setMeta for what is not opened: links, FIFOs, devices.
func setNodeMeta(parent *os.File, base string, h *tar.Header) error {
	if err := unix.Fchownat(int(parent.Fd()), base, h.Uid, h.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return ownerError(h, err)
	}
	if h.Typeflag != tar.TypeSymlink {
		// There is no fchmodat(2) that does not follow links before Linux 6.6. The node was just made here.
		if err := unix.Fchmodat(int(parent.Fd()), base, uint32(h.Mode)&0o7777, 0); err != nil {
			return err
		}
	}
	return setTimes(parent, base, h.ModTime)
}

func ownerError(h *tar.Header, err error) error {
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("its owner %d:%d is not one of the container's", h.Uid, h.Gid)
	}
	return fmt.Errorf("cannot set its owner: %w", err)
}

func setTimes(parent *os.File, base string, t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	if err := unix.UtimesNanoAt(int(parent.Fd()), base, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("cannot set its time: %w", err)
	}
	return nil
}

func (u *unpacker) finish() error {
	for _, d := range slices.Backward(u.dirs) {
		dir, err := openIn(u.root, path.Dir(d.name), unix.O_PATH|unix.O_DIRECTORY, 0)
		if err == nil {
			err = setTimes(dir, path.Base(d.name), d.time)
			dir.Close()
		}
		if vanished(err) != nil {
			return fmt.Errorf("cannot finish %s: %w", d.name, err)
		}
	}
	return nil
}
