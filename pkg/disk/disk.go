// Package disk makes the writable layers of sandboxes: sparse, pre-formatted ext4 files that serve as an overlay's upper
// layer in a container and as a drive in a VM. The ids in them are unshifted either way.
package disk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// MinSize is the smallest layer worth formatting: below it the file system's own tables take most of it.
	MinSize = 4 << 20
	// MaxSize is ext4's largest file of 4 KiB blocks, in which the layer itself lies.
	MaxSize = 16 << 40
	// blockSize is the file system's, and the grain in which a template is searched for data.
	blockSize = 4096
	// maxTemplates bounds the cache: callers choose sizes, and each size costs a file of a few hundred KiB.
	maxTemplates = 32
	// mkfsTimeout bounds one mkfs.ext4; it takes 20 ms here, and a second for the largest sizes.
	mkfsTimeout = 60 * time.Second
	// fsckTimeout bounds one e2fsck of a layer that was not unmounted cleanly.
	fsckTimeout = 10 * time.Minute
	// templatePrefix carries a version: change it with mkfsArgs, so that no older template is used.
	templatePrefix = "ext4-1-"
	// unfinishedPrefix begins the names of directories in which a template is being made.
	unfinishedPrefix = "tmp-"
)

// What is in a new layer.
const (
	upperDir, upperMode = "upper", 0o755 // becomes the sandbox's root directory
	workDir, workMode   = "work", 0o700  // overlayfs's own
)

// mkfsArgs say what every layer looks like, whatever /etc/mke2fs.conf of the host says.
var mkfsArgs = []string{
	"-q", "-F",
	"-t", "ext4",
	"-b", "4096", "-I", "256", "-i", "16384",
	"-m", "0", // nothing reserved for root: root inside the sandbox is not the host's
	"-L", "sandbox",
	// No journal: a layer belongs to one sandbox; what a host crash costs it, e2fsck repairs (Repair). No resize inode:
	// it would cost blocks for a growth that never comes.
	"-O", "none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum",
	// The file is new and so reads as zeros: nothing has to be zeroed, neither now nor by the kernel's background thread
	// (ext4lazyinit) after each mount, which would fill the sparse file with zeros.
	"-E", "assume_storage_prezeroed=1,lazy_itable_init=0,nodiscard,root_owner=0:0",
}

// Maker makes layers. It is safe for concurrent use, by several processes too.
type Maker struct {
	cacheDir string

	mu sync.Mutex // one mkfs at a time
}

// NewMaker keeps its templates in cacheDir, which is made when first needed.
func NewMaker(cacheDir string) *Maker {
	return &Maker{cacheDir: cacheDir}
}

// RemoveUnfinished deletes what a process that died while it made a template left. Only for who has the cache to itself.
func (m *Maker) RemoveUnfinished() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	left, err := filepath.Glob(filepath.Join(m.cacheDir, unfinishedPrefix+"*"))
	for _, dir := range left {
		err = errors.Join(err, os.RemoveAll(dir))
	}
	if err != nil {
		return fmt.Errorf("cannot remove half-made templates of writable layers: %w", err)
	}
	return nil
}

// Create makes a layer of size bytes at path, which must not exist: an ext4 file system with the root-owned directories
// upper and work. On the host it occupies only what is written to it. Errors: KindInvalid for an impossible size.
func (m *Maker) Create(path string, size uint64) (err error) {
	size = size / blockSize * blockSize
	if size < MinSize || size > MaxSize {
		return spec.Invalidf("spec.resources.disk_bytes", "cannot make a writable layer of %d bytes: give it between %d and %d", size, uint64(MinSize), uint64(MaxSize))
	}
	template, err := m.template(size)
	if err != nil {
		return fmt.Errorf("cannot make a writable layer: %w", err)
	}
	defer template.Close() //nolint:errcheck // only read
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("cannot make a writable layer: %w", err)
	}
	defer func() {
		if cerr := f.Close(); err == nil && cerr != nil {
			err = fmt.Errorf("cannot make a writable layer: %w", cerr)
		}
		if err != nil {
			_ = os.Remove(path) // the first error counts
		}
	}()
	if err := copySparse(f, template, int64(size)); err != nil {
		return fmt.Errorf("cannot make a writable layer: %w", err)
	}
	return nil
}

// template answers with the formatted file of a size, made if it is not in the cache yet.
func (m *Maker) template(size uint64) (*os.File, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	name := filepath.Join(m.cacheDir, fmt.Sprintf("%s%d", templatePrefix, size))
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return f, err
	}
	if err := os.MkdirAll(m.cacheDir, 0o700); err != nil {
		return nil, err
	}
	if err := m.evictLocked(maxTemplates - 1); err != nil {
		return nil, err
	}
	if err := m.formatLocked(name, size); err != nil {
		return nil, err
	}
	return os.OpenFile(name, os.O_RDONLY|unix.O_NOFOLLOW, 0)
}

// formatLocked makes a template under a temporary name, so that name never is half a file system.
func (m *Maker) formatLocked(name string, size uint64) error {
	dir, err := os.MkdirTemp(m.cacheDir, unfinishedPrefix)
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir) //nolint:errcheck // swept by evictLocked otherwise
	for _, d := range []struct {
		name string
		mode fs.FileMode
	}{
		{"root", 0o755},
		{"root/" + upperDir, upperMode},
		{"root/" + workDir, workMode},
	} {
		if err := os.Mkdir(filepath.Join(dir, d.name), d.mode); err != nil {
			return err
		}
		if err := os.Chmod(filepath.Join(dir, d.name), d.mode); err != nil { // whatever the umask
			return err
		}
	}
	raw, err := os.OpenFile(filepath.Join(dir, "raw"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer raw.Close() //nolint:errcheck // thrown away
	if err := raw.Truncate(int64(size)); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), mkfsTimeout)
	defer cancel()
	args := append(slices.Clone(mkfsArgs), "-d", filepath.Join(dir, "root"), raw.Name())
	if err := run(ctx, "mkfs.ext4", args...); err != nil {
		return err
	}
	// mkfs writes blocks of zeros too; copying drops them once, so that copies of the template are cheap.
	tight, err := os.OpenFile(filepath.Join(dir, "tight"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return err
	}
	defer tight.Close() //nolint:errcheck // synced below
	if err := copySparse(tight, raw, int64(size)); err != nil {
		return err
	}
	// A template must not come back empty after a host crash: every later layer would be a copy of it.
	if err := tight.Sync(); err != nil {
		return err
	}
	fault.At("layer", "template formatted")
	return os.Rename(tight.Name(), name)
}

// evictLocked removes the oldest templates until at most keep are left, and whatever a daemon that died while formatting left.
func (m *Maker) evictLocked(keep int) error {
	entries, err := os.ReadDir(m.cacheDir)
	if err != nil {
		return err
	}
	type aged struct {
		name string
		at   time.Time
	}
	var templates []aged
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			continue // removed since, by another daemon
		}
		path := filepath.Join(m.cacheDir, e.Name())
		switch {
		case strings.HasPrefix(e.Name(), templatePrefix):
			templates = append(templates, aged{path, info.ModTime()})
		case time.Since(info.ModTime()) > mkfsTimeout*2:
			if err := os.RemoveAll(path); err != nil {
				return err
			}
		}
	}
	slices.SortFunc(templates, func(a, b aged) int { return a.at.Compare(b.at) })
	for len(templates) > keep {
		if err := os.Remove(templates[0].name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		templates = templates[1:]
	}
	return nil
}

// copySparse copies the blocks of src that are not zero to the empty file dst and gives dst the length size.
func copySparse(dst, src *os.File, size int64) error {
	if err := dst.Truncate(size); err != nil {
		return err
	}
	buf := make([]byte, 64*blockSize)
	var zero [blockSize]byte
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(src.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // only a hole is left
		}
		if err != nil {
			return fmt.Errorf("cannot seek data in %s: %w", src.Name(), err)
		}
		end, err := unix.Seek(int(src.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("cannot seek a hole in %s: %w", src.Name(), err)
		}
		for at = data / blockSize * blockSize; at < end; {
			n, err := src.ReadAt(buf[:min(int64(len(buf)), size-at)], at)
			if err != nil && !errors.Is(err, io.EOF) {
				return err
			}
			for off := 0; off < n; off += blockSize {
				b := buf[off:min(off+blockSize, n)]
				if string(b) == string(zero[:len(b)]) {
					continue
				}
				if _, err := dst.WriteAt(b, at+int64(off)); err != nil {
					return err
				}
			}
			if n == 0 {
				return io.ErrUnexpectedEOF
			}
			at += int64(n)
		}
	}
	return nil
}

// run runs a tool of e2fsprogs; its output becomes part of the error.
func run(ctx context.Context, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	// Tools of /sbin are not in every PATH, a daemon's least of all.
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C", "TZ=UTC"}
	path, err := lookPath(name)
	if err != nil {
		return err
	}
	cmd.Path, cmd.Err = path, nil
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("cannot run %s: %w: %s", name, err, strings.TrimSpace(string(out[:min(len(out), 1024)])))
	}
	return nil
}

func lookPath(name string) (string, error) {
	for _, dir := range []string{"/usr/sbin", "/usr/bin", "/sbin", "/bin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", spec.Errorf(spec.KindUnsupported, "cannot find %s; install e2fsprogs", name)
}
