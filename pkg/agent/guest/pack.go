package guest

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

const (
	// maxDepth bounds how deep a copied tree may be: a descriptor is held for each level.
	maxDepth = 256
	// maxLinks bounds how many hard-linked files are remembered. Further ones are copied as files of their own.
	maxLinks = 1 << 16
	// copyBuffer is what is read or written at a time.
	copyBuffer = 64 << 10
	// dirBatch is how many names of a directory are read at a time: a hostile one may have millions.
	dirBatch = 256
)

// paxXattr is the prefix of extended attributes in PAX records, as star, GNU tar and docker write them.
const paxXattr = "SCHILY.xattr."

// pack writes the tree at name in root as a tar stream. Entries are named from name's last element on, "." for the root.
func pack(root *os.File, name string, w io.Writer) error {
	name = path.Clean(name)
	buffered := bufio.NewWriterSize(w, copyBuffer)
	p := &packer{tar: tar.NewWriter(buffered), links: map[inode]string{}, root: root, above: path.Dir(name)}
	base := path.Base(name)
	if base == "/" {
		base = "."
	}
	open := func(flags int) (*os.File, error) { return openIn(root, name, flags, 0) }
	if weaken.Without("resolve copies inside the root") {
		open = func(flags int) (*os.File, error) { return os.OpenFile(name, flags, 0) }
	}
	if err := p.add(open, base, 0); err != nil {
		return err
	}
	return errors.Join(p.tar.Close(), buffered.Flush())
}

type inode struct{ dev, ino uint64 }

type packer struct {
	tar   *tar.Writer
	links map[inode]string // files of which there are several links, by their first name

	root  *os.File
	above string // the directory of what is copied
}

// opener opens one and the same name with different flags.
type opener func(flags int) (*os.File, error)

// add writes what open opens, and what lies below it. What has vanished meanwhile is left out.
func (p *packer) add(open opener, name string, depth int) error {
	f, err := open(unix.O_PATH)
	if err != nil {
		return err
	}
	defer f.Close()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fmt.Errorf("cannot examine %s: %w", name, err)
	}
	h := &tar.Header{
		Format: tar.FormatPAX, Name: name, Mode: int64(st.Mode & 0o7777), Uid: int(st.Uid), Gid: int(st.Gid),
		ModTime: time.Unix(st.Mtim.Unix()),
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		return p.addFile(open, h, &st)
	case unix.S_IFDIR:
		return p.addDir(open, h, &st, depth)
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = readLink(f); err != nil {
			return fmt.Errorf("cannot read link %s: %w", name, err)
		}
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeChar, int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	case unix.S_IFBLK:
		h.Typeflag, h.Devmajor, h.Devminor = tar.TypeBlock, int64(unix.Major(st.Rdev)), int64(unix.Minor(st.Rdev))
	default:
		return nil // a socket: no tar has them, and none is of use without its process
	}
	return p.tar.WriteHeader(h)
}

func (p *packer) addFile(open opener, h *tar.Header, st *unix.Stat_t) error {
	h.Typeflag = tar.TypeReg
	id := inode{st.Dev, st.Ino}
	if first, known := p.links[id]; known {
		h.Typeflag, h.Linkname = tar.TypeLink, first
		return p.tar.WriteHeader(h)
	}
	// Not blocking: what was a file a moment ago may be a FIFO now.
	f, err := open(unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY)
	if err != nil {
		return vanished(err)
	}
	defer f.Close()
	var now unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &now); err != nil {
		return fmt.Errorf("cannot examine %s: %w", h.Name, err)
	}
	if (inode{now.Dev, now.Ino}) != id {
		return nil // another file by now: it came after the copy began
	}
	if err := addXattrs(f, h); err != nil {
		return err
	}
	h.Size = now.Size
	if err := p.tar.WriteHeader(h); err != nil {
		return err
	}
	// What it grows by meanwhile is not part of the copy.
	if n, err := io.Copy(p.tar, io.LimitReader(f, now.Size)); err != nil {
		return fmt.Errorf("cannot copy %s: %w", h.Name, err)
	} else if n < now.Size {
		return fmt.Errorf("cannot copy %s: it was cut while it was read", h.Name)
	}
	if st.Nlink > 1 && len(p.links) < maxLinks {
		p.links[id] = h.Name
	}
	return nil
}

func (p *packer) addDir(open opener, h *tar.Header, st *unix.Stat_t, depth int) error {
	name := h.Name
	h.Typeflag = tar.TypeDir
	h.Name += "/"
	dir, err := open(unix.O_RDONLY | unix.O_DIRECTORY)
	if err != nil {
		return vanished(err)
	}
	defer dir.Close()
	if err := addXattrs(dir, h); err != nil {
		return err
	}
	if err := p.tar.WriteHeader(h); err != nil {
		return err
	}
	if virtual, err := isVirtual(dir); virtual || err != nil {
		return err
	}
	if depth == maxDepth {
		return fmt.Errorf("cannot copy %s: it is more than %d directories deep", name, maxDepth)
	}
	for {
		names, err := dir.Readdirnames(dirBatch)
		for _, child := range names {
			open := func(flags int) (*os.File, error) { return openChild(dir, child, flags) }
			if weaken.Without("copy by descriptor") {
				open = func(flags int) (*os.File, error) {
					return openIn(p.root, path.Join(p.above, name, child), flags|unix.O_NOFOLLOW, 0)
				}
			}
			if err := p.add(open, strings.TrimPrefix(name+"/", "./")+child, depth+1); vanished(err) != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("cannot list %s: %w", name, err)
		}
	}
}

func openChild(dir *os.File, name string, flags int) (*os.File, error) {
	fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}

// vanished is nil for the error of something that is not there any more.
func vanished(err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ELOOP) {
		return nil
	}
	return err
}

// readLink reads the target of the symbolic link that f is open on (O_PATH).
func readLink(f *os.File) (string, error) {
	target := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(int(f.Fd()), "", target)
	return string(target[:max(n, 0)]), err
}

// virtualFilesystems show a kernel, not files: a copy of a tree has their directories and nothing in them.
var virtualFilesystems = []int64{
	unix.PROC_SUPER_MAGIC, unix.SYSFS_MAGIC, unix.DEVPTS_SUPER_MAGIC, unix.CGROUP_SUPER_MAGIC, unix.CGROUP2_SUPER_MAGIC,
	unix.DEBUGFS_MAGIC, unix.TRACEFS_MAGIC, unix.SECURITYFS_MAGIC, unix.BPF_FS_MAGIC, mqueueMagic,
}

// mqueueMagic is MQUEUE_MAGIC of ipc/mqueue.c.
const mqueueMagic = 0x19800202

func isVirtual(dir *os.File) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &st); err != nil {
		return false, fmt.Errorf("cannot examine the file system of %s: %w", dir.Name(), err)
	}
	return slices.Contains(virtualFilesystems, int64(st.Type)), nil
}
