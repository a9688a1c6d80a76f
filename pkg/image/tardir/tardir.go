// Package tardir writes a directory as a tar, so that a client can send it: an OCI layout, or the files of a root file
// system. It depends on little, for it is linked into the command line.
package tardir

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Write writes the files below dir to w. The tar depends on the files alone: names are sorted, times are modification
// times, owners are numbers. Symbolic links are kept as such, dir itself excepted; hard links, devices, fifos and extended
// attributes are kept, sockets left out. Other file systems mounted below dir are part of it.
func Write(w io.Writer, dir string) error {
	root, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return fmt.Errorf("cannot read the directory %s: %w", dir, err)
	}
	t := &writer{tar: tar.NewWriter(w), root: root, seen: map[fileID]string{}}
	if err := filepath.WalkDir(root, t.add); err != nil {
		return fmt.Errorf("cannot pack the directory %s: %w", dir, err)
	}
	if err := t.tar.Close(); err != nil {
		return fmt.Errorf("cannot pack the directory %s: %w", dir, err)
	}
	return nil
}

type writer struct {
	tar  *tar.Writer
	root string
	// The first name of each file that has several.
	seen map[fileID]string
}

type fileID struct{ dev, ino uint64 }

func (t *writer) add(path string, d fs.DirEntry, err error) error {
	if err != nil {
		return err
	}
	if d.Type()&fs.ModeSocket != 0 {
		return nil
	}
	info, err := d.Info()
	if err != nil {
		return err
	}
	name, err := filepath.Rel(t.root, path)
	if err != nil {
		return err
	}
	hdr, err := header(path, name, info)
	if err != nil {
		return err
	}
	st := info.Sys().(*syscall.Stat_t)
	id := fileID{uint64(st.Dev), st.Ino}
	if first, ok := t.seen[id]; ok {
		hdr.Typeflag, hdr.Linkname, hdr.Size, hdr.PAXRecords = tar.TypeLink, first, 0, nil
		return t.tar.WriteHeader(hdr)
	}
	if st.Nlink > 1 && !info.IsDir() {
		t.seen[id] = name
	}
	if err := t.tar.WriteHeader(hdr); err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return nil
	}
	return t.data(path, hdr.Size)
}

func header(path, name string, info fs.FileInfo) (*tar.Header, error) {
	link := ""
	if info.Mode()&fs.ModeSymlink != 0 {
		var err error
		if link, err = os.Readlink(path); err != nil {
			return nil, err
		}
	}
	hdr, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return nil, err
	}
	hdr.Name, hdr.Format = name, tar.FormatPAX
	if info.IsDir() {
		hdr.Name += "/"
	}
	// Names of users are this host's affair, and these times change by reading.
	hdr.Uname, hdr.Gname = "", ""
	hdr.AccessTime, hdr.ChangeTime = time.Time{}, time.Time{}
	hdr.PAXRecords, err = xattrs(path)
	return hdr, err
}

// data copies a file that must not change its size meanwhile.
func (t *writer) data(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	n, err := io.Copy(t.tar, io.LimitReader(f, size))
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	if n != size {
		return fmt.Errorf("%s became shorter while it was read", path)
	}
	return nil
}

// xattrs reads a file's extended attributes as PAX records, nil if there are none or the file system has no such thing.
func xattrs(path string) (map[string]string, error) {
	names, err := sized(func(buf []byte) (int, error) { return unix.Llistxattr(path, buf) })
	if err != nil || len(names) == 0 {
		return nil, err
	}
	records := map[string]string{}
	for name := range bytes.SplitSeq(bytes.TrimSuffix(names, []byte{0}), []byte{0}) {
		value, err := sized(func(buf []byte) (int, error) { return unix.Lgetxattr(path, string(name), buf) })
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot read %s of %s: %w", name, path, err)
		}
		records["SCHILY.xattr."+string(name)] = string(value)
	}
	return records, nil
}

// sized calls get first for the size and then for the bytes, again if they grew in between.
func sized(get func(buf []byte) (int, error)) ([]byte, error) {
	for {
		n, err := get(nil)
		if errors.Is(err, unix.ENOTSUP) {
			return nil, nil
		}
		if err != nil || n == 0 {
			return nil, err
		}
		buf := make([]byte, n)
		n, err = get(buf)
		if errors.Is(err, unix.ERANGE) {
			continue
		}
		return buf[:max(n, 0)], err
	}
}
