package microvm

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/fault"
)

// copyChunk is how much of a memory is copied at once, and the grain of its holes.
const copyChunk = 64 << 10

// saveTemplate writes t's files to dir/<key>, whole or not at all after a crash, and the sums into t.meta.
func saveTemplate(dir string, t *template) (err error) {
	path := filepath.Join(dir, string(t.meta.Key))
	if err := os.RemoveAll(path); err != nil {
		return fmt.Errorf("cannot replace a template: %w", err)
	}
	if err := os.Mkdir(path, 0o700); err != nil {
		return fmt.Errorf("cannot keep a template: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("cannot keep a template: %w", err), os.RemoveAll(path))
		}
	}()
	for _, f := range []struct {
		name string
		from *os.File
		sum  *string
	}{
		{memoryFile, t.memory, &t.meta.MemorySum},
		{stateFile, t.state, &t.meta.StateSum},
	} {
		if *f.sum, err = saveSparse(filepath.Join(path, f.name), f.from); err != nil {
			return err
		}
	}
	fault.At("vm template", "memory written")
	meta, err := json.Marshal(t.meta)
	if err != nil {
		return err
	}
	return writeFileDurable(filepath.Join(path, metaFile), meta, 0o400)
}

// saveSparse copies from to a new file that has a hole wherever from is zero.
func saveSparse(path string, from *os.File) (sum string, err error) {
	to, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o400)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, to.Close()) }()
	if sum, err = copySparse(to, from); err == nil {
		err = to.Sync()
	}
	return sum, err
}

// copySparse copies the content of from to the empty file to, skipping what is zero, and answers with its sum: SHA-256 of
// each piece that is not, after its offset.
func copySparse(to, from *os.File) (string, error) { return copySum(to, from, sha256.New()) }

// sumSparse is the sum that copySparse answers with, of a file that is copied nowhere.
func sumSparse(from *os.File) (string, error) { return copySum(nil, from, sha256.New()) }

// copyHoles is copySparse without a sum.
func copyHoles(to, from *os.File) error {
	_, err := copySum(to, from, nil)
	return err
}

// copySum copies to to and sums with h, unless they are nil.
func copySum(to, from *os.File, h hash.Hash) (string, error) {
	info, err := from.Stat()
	if err != nil {
		return "", err
	}
	size := info.Size()
	if to != nil {
		if err := to.Truncate(size); err != nil {
			return "", err
		}
	}
	buffer, zeros := make([]byte, copyChunk), make([]byte, copyChunk)
	for offset := int64(0); offset < size; {
		if offset, err = unix.Seek(int(from.Fd()), offset, unix.SEEK_DATA); errors.Is(err, unix.ENXIO) {
			break // nothing but a hole
		}
		if err != nil {
			return "", err
		}
		offset -= offset % copyChunk
		n, err := from.ReadAt(buffer[:min(copyChunk, size-offset)], offset)
		if err != nil && !errors.Is(err, io.EOF) {
			return "", err
		}
		if piece := buffer[:n]; !bytes.Equal(piece, zeros[:n]) {
			if h != nil {
				fmt.Fprintf(h, "%d %d\n", offset, n)
				h.Write(piece)
			}
			if to != nil {
				if _, err := to.WriteAt(piece, offset); err != nil {
					return "", err
				}
			}
		}
		offset += int64(max(n, 1))
	}
	if h == nil {
		return "", nil
	}
	fmt.Fprintf(h, "%d\n", size)
	return hex.EncodeToString(h.Sum(nil)), nil
}

// loadTemplate reads a template into sealed memory and compares the sums.
func loadTemplate(dir string, meta templateMeta) (_ *template, err error) {
	t := &template{meta: meta, held: 1}
	defer func() {
		if err != nil {
			for _, f := range []*os.File{t.memory, t.state} {
				if f != nil {
					err = errors.Join(err, f.Close())
				}
			}
		}
	}()
	if t.memory, err = loadSealed(filepath.Join(dir, memoryFile), int64(meta.MemoryBytes), meta.MemorySum); err != nil {
		return nil, err
	}
	t.state, err = loadSealed(filepath.Join(dir, stateFile), maxTemplateState, meta.StateSum)
	return t, err
}

func loadSealed(path string, limit int64, sum string) (_ *os.File, err error) {
	from, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	defer from.Close()
	info, err := from.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > limit {
		return nil, fmt.Errorf("%s is no file of at most %d bytes", filepath.Base(path), limit)
	}
	to, err := newMemfd("template-" + filepath.Base(path))
	if err != nil {
		return nil, err
	}
	got, err := copySparse(to, from)
	if err == nil && got != sum {
		err = fmt.Errorf("its %s is damaged", filepath.Base(path))
	}
	if err == nil {
		err = seal(to)
	}
	if err != nil {
		return nil, errors.Join(err, to.Close())
	}
	// Read once; the copy in memory is what is used.
	_ = unix.Fadvise(int(from.Fd()), 0, 0, unix.FADV_DONTNEED)
	return to, nil
}

// seal has the kernel refuse every later change of a file in memory, whoever has it open.
func seal(f *os.File) error {
	if _, err := unix.FcntlInt(f.Fd(), unix.F_ADD_SEALS, unix.F_SEAL_WRITE|unix.F_SEAL_GROW|unix.F_SEAL_SHRINK|unix.F_SEAL_SEAL); err != nil {
		return fmt.Errorf("cannot seal a template: %w", err)
	}
	return nil
}
