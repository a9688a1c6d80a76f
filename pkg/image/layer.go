package image

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// entry is what one tar header says, checked: a file, or another name for one (hardLink).
type entry struct {
	path     []string // empty for the root
	node     *inode   // nil for a hard link
	hardLink []string
}

func (e *entry) String() string {
	return quote("/" + strings.Join(e.path, "/"))
}

// readLayer reads the headers of a tar. File data stays where it is, but for sparse files, whose data is spread out: they
// are written to a spool that expand opens.
func readLayer(ctx context.Context, s section, b *budget, expand func() (*os.File, error)) ([]entry, error) {
	src := io.NewSectionReader(s.file, s.off, s.size)
	tr := tar.NewReader(src)
	var entries []entry
	var sparse section
	for {
		if len(entries)%checkEvery == 0 && ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		hdr, err := tr.Next()
		switch {
		case errors.Is(err, io.EOF):
			return entries, nil
		case isHostError(err):
			return nil, err
		case err != nil:
			return nil, invalidf("its tar is damaged after %d entries: %w", len(entries), err)
		}
		if hdr.Typeflag == tar.TypeXGlobalHeader {
			continue
		}
		e, err := readEntry(hdr, b)
		if err != nil {
			return nil, err
		}
		if e.node != nil && e.node.mode.IsRegular() && hdr.Size > 0 {
			if e.node.data, err = locate(ctx, hdr, tr, src, s, &sparse, b, expand); err != nil {
				return nil, err
			}
		}
		entries = append(entries, e)
	}
}

// locate says where a file's data is.
func locate(ctx context.Context, hdr *tar.Header, tr *tar.Reader, src *io.SectionReader, s section, sparse *section, b *budget,
	expand func() (*os.File, error),
) (section, error) {
	if isSparse(hdr) {
		return expandSparse(ctx, hdr, tr, s.size, sparse, b, expand)
	}
	at, err := src.Seek(0, io.SeekCurrent)
	if err != nil {
		return section{}, err
	}
	if hdr.Size > s.size-at {
		return section{}, invalidf("its tar ends within %s", quote(hdr.Name))
	}
	return section{s.file, s.off + at, hdr.Size}, nil
}

// isSparse reports whether a file's data does not lie in the tar as it is. archive/tar shows old GNU sparse files by type
// and PAX ones by their records only.
func isSparse(hdr *tar.Header) bool {
	if hdr.Typeflag == tar.TypeGNUSparse {
		return true
	}
	for key := range hdr.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// expandSparse appends a sparse file to the spool for them, as a file with holes.
func expandSparse(ctx context.Context, hdr *tar.Header, tr *tar.Reader, tarSize int64, sparse *section, b *budget,
	expand func() (*os.File, error),
) (section, error) {
	if sparse.file == nil {
		f, err := expand()
		if err != nil {
			return section{}, err
		}
		sparse.file = f
	}
	start := sparse.size
	buf := make([]byte, copyBuffer)
	for {
		if ctx.Err() != nil {
			return section{}, context.Cause(ctx)
		}
		n, err := tr.Read(buf)
		if n > 0 {
			if err := b.expand(n); err != nil {
				return section{}, err
			}
			if !isZero(buf[:n]) {
				if _, err := sparse.file.WriteAt(buf[:n], sparse.size); err != nil {
					return section{}, err
				}
			}
			sparse.size += int64(n)
			if sparse.size > b.expandFloor+b.expandFactor*tarSize {
				return section{}, b.bomb()
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return section{}, invalidf("its tar is damaged within %s: %w", quote(hdr.Name), err)
		}
	}
	if sparse.size-start != hdr.Size {
		return section{}, invalidf("its tar has %d bytes of %s instead of %d", sparse.size-start, quote(hdr.Name), hdr.Size)
	}
	// A hole at the end must not be past the end of the file.
	if err := sparse.file.Truncate(sparse.size); err != nil {
		return section{}, err
	}
	return section{sparse.file, start, hdr.Size}, nil
}

func isZero(p []byte) bool {
	for _, c := range p {
		if c != 0 {
			return false
		}
	}
	return true
}

// readEntry checks a header. Every number and string in it is the image's maker's.
func readEntry(hdr *tar.Header, b *budget) (entry, error) {
	path, err := splitName(hdr.Name)
	if err != nil {
		return entry{}, err
	}
	cost := int64(len(hdr.Name) + len(hdr.Linkname))
	if hdr.Typeflag == tar.TypeLink {
		target, err := splitHardLink(hdr)
		if err != nil {
			return entry{}, err
		}
		if len(path) == 0 {
			return entry{}, invalidf("its root is not a directory")
		}
		return entry{path: path, hardLink: target}, b.entry(cost)
	}
	node, err := newInode(hdr)
	if err != nil {
		return entry{}, err
	}
	for key, value := range node.xattrs {
		cost += int64(len(key) + len(value))
	}
	if node.mode.IsRegular() && node.size <= inlineData {
		cost += node.size
	}
	return entry{path: path, node: node}, b.entry(cost)
}

// splitName cuts an entry's name into its parts. Like tar itself it takes a name with a leading slash to be meant from
// the root on; a name that climbs is refused, also where it would end inside.
func splitName(name string) ([]string, error) {
	if len(name) > maxPath {
		return nil, invalidf("a file's path in it has %d bytes, more than %d", len(name), maxPath)
	}
	if strings.ContainsRune(name, 0) {
		return nil, invalidf("%s has a NUL in its name", quote(name))
	}
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		switch {
		case part == "" || part == ".":
		case part == "..":
			return nil, invalidf("%s leads out of the image", quote(name))
		case len(part) > maxName:
			return nil, invalidf("a file's name in it has %d bytes, more than %d", len(part), maxName)
		default:
			parts = append(parts, part)
		}
	}
	return parts, nil
}

// splitHardLink checks the file a hard link is to. A tool that unpacks trustingly would give the image a file of the
// host's, so none that is written that way is let in.
func splitHardLink(hdr *tar.Header) ([]string, error) {
	if strings.HasPrefix(hdr.Linkname, "/") {
		return nil, invalidf("%s is a hard link to %s, out of the image: hard links must be relative to its root", quote(hdr.Name), quote(hdr.Linkname))
	}
	target, err := splitName(hdr.Linkname)
	if err != nil {
		return nil, invalidf("%s is a hard link that cannot be: %w", quote(hdr.Name), err)
	}
	if len(target) == 0 {
		return nil, invalidf("%s is a hard link to a directory", quote(hdr.Name))
	}
	return target, nil
}

// Linux's ranges of device numbers, which are also EROFS's.
const (
	maxMajor = 1<<12 - 1
	maxMinor = 1<<20 - 1
)

func newInode(hdr *tar.Header) (*inode, error) {
	const maxID = 1<<32 - 2 // -1 means "no id" to the kernel
	if hdr.Uid < 0 || hdr.Uid > maxID || hdr.Gid < 0 || hdr.Gid > maxID {
		return nil, invalidf("%s belongs to %d:%d, which cannot be", quote(hdr.Name), hdr.Uid, hdr.Gid)
	}
	n := &inode{
		mode: fileMode(hdr.Mode),
		uid:  uint32(hdr.Uid),
		gid:  uint32(hdr.Gid),
		sec:  hdr.ModTime.Unix(),
		nsec: uint32(hdr.ModTime.Nanosecond()),
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		if hdr.Size < 0 {
			return nil, invalidf("%s has the size %d", quote(hdr.Name), hdr.Size)
		}
		n.size = hdr.Size
	case tar.TypeDir:
		n.mode |= fs.ModeDir
		n.children = map[string]dentry{}
	case tar.TypeSymlink:
		if hdr.Linkname == "" || len(hdr.Linkname) > maxPath || strings.ContainsRune(hdr.Linkname, 0) {
			return nil, invalidf("%s is a symbolic link to %s, which cannot be", quote(hdr.Name), quote(hdr.Linkname))
		}
		// The kernel knows no permissions of symbolic links and shows all; what a tar says varies with its maker.
		n.mode = fs.ModeSymlink | 0o777
		n.link = hdr.Linkname
	case tar.TypeChar, tar.TypeBlock:
		if hdr.Devmajor < 0 || hdr.Devmajor > maxMajor || hdr.Devminor < 0 || hdr.Devminor > maxMinor {
			return nil, invalidf("%s is the device %d:%d, which cannot be", quote(hdr.Name), hdr.Devmajor, hdr.Devminor)
		}
		n.mode |= fs.ModeDevice
		if hdr.Typeflag == tar.TypeChar {
			n.mode |= fs.ModeCharDevice
		}
		n.rdev = uint32(unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor)))
	case tar.TypeFifo:
		n.mode |= fs.ModeNamedPipe
	default:
		return nil, invalidf("%s is of a type (%q) that no Linux file has", quote(hdr.Name), hdr.Typeflag)
	}
	var err error
	n.xattrs, err = xattrs(hdr)
	return n, err
}

func fileMode(mode int64) fs.FileMode {
	m := fs.FileMode(mode & 0o777)
	if mode&unix.S_ISUID != 0 {
		m |= fs.ModeSetuid
	}
	if mode&unix.S_ISGID != 0 {
		m |= fs.ModeSetgid
	}
	if mode&unix.S_ISVTX != 0 {
		m |= fs.ModeSticky
	}
	return m
}
