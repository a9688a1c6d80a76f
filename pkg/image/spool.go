package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// copyBuffer is how much is copied at once: large enough that system calls cost nothing against hashing.
const copyBuffer = 256 << 10

// newSpool opens a file without a name in dir: whatever ends this process, its space is given back.
func newSpool(dir string) (*os.File, error) {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return os.NewFile(uintptr(fd), dir+"/(spool)"), nil
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) && !errors.Is(err, unix.ENOENT) {
		return nil, fmt.Errorf("cannot make a spool file in %s: %w", dir, err)
	}
	// The file system has no O_TMPFILE (older overlayfs). Open clears dir of what a kill between these two leaves.
	f, err := os.CreateTemp(dir, "spool-")
	if err != nil {
		return nil, fmt.Errorf("cannot make a spool file: %w", err)
	}
	if err := os.Remove(f.Name()); err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot unlink a spool file: %w", err)
	}
	return f, nil
}

// copyAll is io.Copy that stops when ctx is done, between reads.
func copyAll(ctx context.Context, dst io.Writer, src io.Reader) (int64, error) {
	var total int64
	buf := make([]byte, copyBuffer)
	for {
		if ctx.Err() != nil {
			return total, context.Cause(ctx)
		}
		n, err := src.Read(buf)
		if n > 0 {
			if _, err := dst.Write(buf[:n]); err != nil {
				return total, err
			}
			total += int64(n)
		}
		if errors.Is(err, io.EOF) {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// isHostError tells a failure of this host, or of the transport, from a fault of the bytes read.
func isHostError(err error) bool {
	var errno syscall.Errno
	var path *fs.PathError
	return errors.As(err, &errno) || errors.As(err, &path) || errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded)
}

// isTyped reports whether err already has a kind.
func isTyped(err error) bool { return spec.KindOf(err) != spec.KindInternal }

// classify gives an error of the host the kind a caller can act on.
func classify(err error) error {
	switch {
	case err == nil || isTyped(err):
		return err
	case errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT):
		return spec.Errorf(spec.KindExhausted, "%w: free space where images are kept, or remove images", err)
	}
	return err
}

// quote shows a string of an image's in an error, at bearable length and without control characters.
func quote(s string) string {
	const shown = 200
	if len(s) > shown {
		return strconv.Quote(s[:shown]) + "…"
	}
	return strconv.Quote(s)
}
