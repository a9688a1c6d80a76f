package disk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/fault"
)

// A sandbox's writable layer lies in <state-dir>/sandbox/<id>: the file disk.ext4, and beside it an empty file
// owner.<runtime> that says which runtime made it. The name carries it because making an empty file is atomic.
const (
	layerFile   = "disk.ext4"
	ownerPrefix = "owner."
	layersDir   = "sandbox"
)

// LayerPath is where the writable layer of a sandbox lies.
func LayerPath(stateDir, id string) string {
	return filepath.Join(stateDir, layersDir, id, layerFile)
}

// Layer answers with the path of a sandbox's writable layer: the one it had, else a new one of size bytes that belongs
// to the runtime owner. A layer of another runtime is refused: a file system that a guest kernel wrote must not be
// mounted by the host's.
func (m *Maker) Layer(stateDir, id, owner string, size uint64) (path string, created bool, err error) {
	dir := filepath.Join(stateDir, layersDir, id)
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return "", false, fmt.Errorf("cannot make the layers' directory: %w", err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return "", false, fmt.Errorf("cannot make a layer's directory: %w", err)
	}
	fault.At("layer", "directory made")
	st, err := os.Lstat(dir)
	if err != nil {
		return "", false, fmt.Errorf("cannot examine a layer's directory: %w", err)
	}
	if !st.IsDir() {
		return "", false, fmt.Errorf("cannot use %s: it is no directory", dir)
	}
	if by := layerOwner(dir); by != "" && by != owner {
		return "", false, fmt.Errorf("cannot use the writable layer of %s: runtime %s made it, not %s", id, by, owner)
	}
	marker, err := os.OpenFile(filepath.Join(dir, ownerPrefix+owner), os.O_WRONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return "", false, fmt.Errorf("cannot mark a layer: %w", err)
	}
	if err := marker.Close(); err != nil {
		return "", false, fmt.Errorf("cannot mark a layer: %w", err)
	}
	fault.At("layer", "marked")
	path = filepath.Join(dir, layerFile)
	switch _, err := os.Lstat(path); {
	case err == nil:
		return path, false, nil
	case !errors.Is(err, fs.ErrNotExist):
		return "", false, fmt.Errorf("cannot examine a writable layer: %w", err)
	}
	// Under another name until it is whole: a layer that a later start finds must be one.
	tmp := path + ".tmp"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", false, fmt.Errorf("cannot remove half a layer: %w", err)
	}
	if err := m.Create(tmp, size); err != nil {
		return "", false, err
	}
	fault.At("layer", "copied")
	if err := os.Rename(tmp, path); err != nil {
		return "", false, fmt.Errorf("cannot name a layer: %w", err)
	}
	return path, true, nil
}

// RemoveLayer deletes a sandbox's writable layer and its directory, whoever made it. Idempotent.
func RemoveLayer(stateDir, id string) error {
	if err := os.RemoveAll(filepath.Join(stateDir, layersDir, id)); err != nil {
		return fmt.Errorf("cannot remove a writable layer: %w", err)
	}
	return nil
}

// UnlinkLayer is RemoveLayer for who does not wait for the disk: when it returns the layer's name is gone, but the kernel may
// have to finish writing to the file before it can free its blocks, and does so when the result is closed. Nil if there was
// no such layer.
func UnlinkLayer(stateDir, id string) (*os.File, error) {
	f, err := os.OpenFile(LayerPath(stateDir, id), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		f = nil // RemoveLayer says what is wrong, if anything is
	}
	return f, RemoveLayer(stateDir, id)
}

// Layers names the sandboxes whose layers belong to owner, and those whose maker died before it said who it was.
func Layers(stateDir, owner string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(stateDir, layersDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("cannot list layers: %w", err)
	}
	var ids []string
	for _, e := range entries {
		if by := layerOwner(filepath.Join(stateDir, layersDir, e.Name())); by == owner || by == "" {
			ids = append(ids, e.Name())
		}
	}
	return ids, nil
}

// layerOwner is the runtime that made the layer in dir; empty if it does not say.
func layerOwner(dir string) string {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return "" // gone, or never finished: nobody's
	}
	for _, e := range entries {
		if owner, ok := strings.CutPrefix(e.Name(), ownerPrefix); ok {
			return owner
		}
	}
	return ""
}

// Usage is how many bytes a layer occupies on the host, and how many it may.
func Usage(path string) (used, limit uint64, err error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return 0, 0, fmt.Errorf("cannot examine the writable layer: %w", err)
	}
	return uint64(st.Blocks) * 512, uint64(st.Size), nil // st_blocks counts 512 bytes whatever the file system's block
}
