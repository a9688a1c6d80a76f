// Package wholefile reads and replaces small files as a whole: bounded when they are read, whichever daemon or person wrote
// them, and in one step when they are written, so that a reader sees the old content or the new.
package wholefile

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// ErrTooLarge: the file has more than the reader is ready to hold.
var ErrTooLarge = errors.New("too large")

// Read reads the file at path, which must be a regular one of at most limit bytes. It waits for nobody: a FIFO is refused.
func Read(path string, limit int64) ([]byte, error) { return read(path, 0, limit) }

// ReadOwn is Read for a file of the daemon's own, which is no symbolic link.
func ReadOwn(path string, limit int64) ([]byte, error) { return read(path, unix.O_NOFOLLOW, limit) }

func read(path string, flags int, limit int64) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|flags, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return ReadFrom(f, limit)
}

// ReadFrom is Read of an open file, from its beginning.
func ReadFrom(f *os.File, limit int64) ([]byte, error) {
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s is not a regular file", f.Name())
	}
	if info.Size() > limit {
		return nil, fmt.Errorf("%s: %w: %d bytes, at most %d are allowed", f.Name(), ErrTooLarge, info.Size(), limit)
	}
	b := make([]byte, info.Size())
	n, err := io.ReadFull(f, b)
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		err = nil // it has become shorter since
	}
	if err != nil {
		return nil, fmt.Errorf("cannot read %s: %w", f.Name(), err)
	}
	return b[:n], nil
}

// temporary ends the name of what is being written. One writer a file: what a daemon that died left there is overwritten.
const temporary = ".tmp"

// Replace writes the file at path, mode 0600, in one step.
func Replace(path string, data []byte) error { return replace(path, data, false) }

// ReplaceDurably answers when the file is on the disk, its name included: what it says outlives the host's boot.
func ReplaceDurably(path string, data []byte) error {
	if err := replace(path, data, true); err != nil {
		return err
	}
	return SyncDir(filepath.Dir(path))
}

func replace(path string, data []byte, durable bool) error {
	f, err := os.OpenFile(path+temporary, os.O_WRONLY|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil && durable {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return err
	}
	return os.Rename(path+temporary, path)
}

// SyncDir answers when the names in a directory are on the disk.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("cannot sync %s: %w", dir, err)
	}
	if err = errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("cannot sync %s: %w", dir, err)
	}
	return nil
}
