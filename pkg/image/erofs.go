package image

import (
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/erofs/go-erofs"
)

// blockSize of the EROFS file: the page size of every host and guest we serve, which older kernels demand. Data is not
// compressed, so that the page cache maps straight to the file, and each file's starts at a block of its own.
const blockSize = 4096

// writeErofs writes a merged tree as an EROFS file. It frees nothing of the tree: file data is read from the spools as it
// is written, so that memory holds names and inodes only.
func writeErofs(ctx context.Context, out *os.File, t *tree, digest string, progress func(done, total int64)) (err error) {
	// The writer is young. What it makes of a hostile tree must not end the daemon.
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("cannot write the image's file: the EROFS writer failed: %v", p)
		}
	}()
	inodes, data := t.freeze()
	w := &blockWriter{ctx: ctx, f: out, progress: func(done int64) { progress(min(done, data), data) }}
	// A fixed time makes the file depend on the image alone; inodes with this modification time are stored in half the space.
	ew := erofs.Create(w, erofs.WithBlockSize(blockSize), erofs.WithBuildTime(0, 0))
	if err := ew.CopyFrom(treeFS{ctx, t.root}); err != nil {
		return fmt.Errorf("cannot lay out the image's file: %w", err)
	}
	if err := ew.Close(); err != nil {
		return fmt.Errorf("cannot write the image's file: %w", err)
	}
	if err := w.flush(); err != nil {
		return fmt.Errorf("cannot write the image's file: %w", err)
	}
	if err := finishErofs(out, t.root, inodes, digest); err != nil {
		return fmt.Errorf("cannot finish the image's file: %w", err)
	}
	progress(data, data)
	return nil
}

// blockWriter gathers the writer's many small writes, and ends them when ctx is done.
type blockWriter struct {
	ctx      context.Context
	f        *os.File
	buf      []byte
	off      int64 // of the buffer's start in the file
	progress func(done int64)
}

const writeBuffer = 1 * mib

func (w *blockWriter) Write(p []byte) (int, error) {
	if len(w.buf)+len(p) > writeBuffer {
		if err := w.flush(); err != nil {
			return 0, err
		}
	}
	if len(p) >= writeBuffer {
		return w.writeThrough(p)
	}
	w.buf = append(w.buf, p...)
	return len(p), nil
}

func (w *blockWriter) writeThrough(p []byte) (int, error) {
	if w.ctx.Err() != nil {
		return 0, context.Cause(w.ctx)
	}
	n, err := w.f.WriteAt(p, w.off)
	w.off += int64(n)
	w.progress(w.off)
	return n, err
}

func (w *blockWriter) flush() error {
	_, err := w.writeThrough(w.buf)
	w.buf = w.buf[:0]
	return err
}

func (w *blockWriter) Seek(offset int64, whence int) (int64, error) {
	if whence != io.SeekStart {
		return 0, fmt.Errorf("cannot seek from %d", whence)
	}
	if err := w.flush(); err != nil {
		return 0, err
	}
	w.off = offset
	return offset, nil
}

// treeFS shows a frozen tree to the EROFS writer, which walks it by path.
type treeFS struct {
	ctx  context.Context
	root *inode
}

func (t treeFS) find(op, path string) (frozen, error) {
	at := frozen{name: ".", first: true, inode: t.root}
	if path == "." {
		return at, nil
	}
	for start := 0; start <= len(path); {
		end := start
		for end < len(path) && path[end] != '/' {
			end++
		}
		next, ok := at.child(path[start:end])
		if !ok {
			return frozen{}, &fs.PathError{Op: op, Path: path, Err: fs.ErrNotExist}
		}
		at, start = next, end+1
	}
	return at, nil
}

func (t treeFS) Open(path string) (fs.File, error) {
	f, err := t.find("open", path)
	if err != nil {
		return nil, err
	}
	if f.isDir() {
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrInvalid}
	}
	return &treeFile{info: fileInfo{f}, r: io.NewSectionReader(f.data.file, f.data.off, f.data.size)}, nil
}

func (t treeFS) Stat(path string) (fs.FileInfo, error) {
	f, err := t.find("stat", path)
	return fileInfo{f}, err
}

func (t treeFS) ReadLink(path string) (string, error) {
	f, err := t.find("readlink", path)
	if err != nil {
		return "", err
	}
	return f.link, nil
}

func (t treeFS) ReadDir(path string) ([]fs.DirEntry, error) {
	if t.ctx.Err() != nil {
		return nil, context.Cause(t.ctx)
	}
	dir, err := t.find("readdir", path)
	if err != nil {
		return nil, err
	}
	entries := make([]fs.DirEntry, len(dir.entries))
	for i, f := range dir.entries {
		entries[i] = fileInfo{f}
	}
	return entries, nil
}

type treeFile struct {
	info fileInfo
	r    *io.SectionReader
}

func (f *treeFile) Stat() (fs.FileInfo, error) { return f.info, nil }
func (f *treeFile) Read(p []byte) (int, error) { return f.r.Read(p) }
func (f *treeFile) Close() error               { return nil }

// fileInfo shows a name and its inode. The second and further names of an inode are shown as empty files: the writer
// knows no hard links and would copy the data for each. finishErofs makes them names of the first.
type fileInfo struct{ frozen }

func (i fileInfo) Name() string               { return i.name }
func (i fileInfo) Type() fs.FileMode          { return i.mode.Type() }
func (i fileInfo) Info() (fs.FileInfo, error) { return i, nil }
func (i fileInfo) IsDir() bool                { return i.isDir() }
func (i fileInfo) Mode() fs.FileMode          { return i.mode }
func (i fileInfo) ModTime() time.Time         { return time.Unix(i.sec, int64(i.nsec)) }

func (i fileInfo) Size() int64 {
	if !i.first {
		return 0
	}
	return i.size
}

// Sys gives the writer what fs.FileInfo has no place for, in the form it knows.
func (i fileInfo) Sys() any {
	if !i.first {
		return &erofs.Stat{Nlink: 1}
	}
	return &erofs.Stat{
		UID: i.uid, GID: i.gid,
		Mtime: uint64(i.sec), MtimeNs: i.nsec,
		Nlink:  int(i.nlink),
		Rdev:   i.rdev,
		Xattrs: erofsXattrs(i.xattrs),
	}
}

// erofsXattrs spells POSIX ACLs as the writer needs it: it takes their names for prefixes that end in a dot, and would
// store system.posix_acl_access without one under a name the kernel cannot find.
func erofsXattrs(m map[string]string) map[string]string {
	if _, access := m[aclAccess]; !access {
		if _, def := m[aclDefault]; !def {
			return m
		}
	}
	spelled := make(map[string]string, len(m))
	for name, value := range m {
		if name == aclAccess || name == aclDefault {
			name += "."
		}
		spelled[name] = value
	}
	return spelled
}
