package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

const (
	// maxEntries bounds how many files one copy may bring: a sandbox could send names for ever.
	maxEntries = 8 << 20
	// maxDirBytes bounds what is kept in memory of the directories, whose modes and times are set at the end: it is room for
	// half a million directories with names as long as people make them.
	maxDirBytes = 64 << 20
	// dirBytes is what a directory takes beside its name: a dirEnd, twice since slices grow by copying.
	dirBytes = 96
)

// unpacker unpacks the tar of a sandbox, which may be hostile, below one place. Every path is resolved by an os.Root, so
// that neither names nor links lead out of it; nothing gets setuid bits, devices are not made, owners are not changed
// unless asked.
type unpacker struct {
	archive bool
	warn    func(string)

	root *os.Root
	top  string // the name every entry begins with
	dirs []dirEnd
	kept int // bytes that dirs takes
}

// dirEnd is what is done to a directory at the end. Nothing else of its header is kept: it may be a megabyte long.
type dirEnd struct {
	name  string // below root
	mode  fs.FileMode
	mtime time.Time
}

// unpack puts first and what follows it at t.
func (u *unpacker) unpack(ctx context.Context, tr *tar.Reader, first *tar.Header, t target) (err error) {
	if u.root, err = os.OpenRoot(t.dir); err != nil {
		return fmt.Errorf("cannot copy: %w", err)
	}
	defer func() { err = errors.Join(err, u.root.Close()) }()
	if first.Typeflag != tar.TypeDir {
		return u.entry(tr, first, t.name)
	}
	if t.name != "." {
		if err := u.enter(first, t.name); err != nil {
			return fmt.Errorf("cannot copy to %s: %w", filepath.Join(t.dir, t.name), err)
		}
	}
	u.top = path.Clean(strings.TrimLeft(first.Name, "/"))
	for n := 0; ; n++ {
		header, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return u.finishDirs()
		}
		if err != nil {
			return orTarError(err)
		}
		if n >= maxEntries {
			return fmt.Errorf("cannot copy: the sandbox sent more than %d files", maxEntries)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		name, err := below(u.top, header.Name)
		if err != nil {
			return err
		}
		if err := u.entry(tr, header, name); err != nil {
			return err
		}
	}
}

// below is a name without the directory that was asked for, which every entry begins with.
func below(top, name string) (string, error) {
	clean := path.Clean(strings.TrimLeft(name, "/"))
	if top != "." {
		rest, ok := strings.CutPrefix(clean, top+"/")
		if !ok {
			return "", fmt.Errorf("cannot copy: the sandbox sent %q, which is not in %q", name, top)
		}
		clean = rest
	}
	if !filepath.IsLocal(clean) {
		return "", fmt.Errorf("cannot copy: the sandbox sent %q, which leads out of the destination", name)
	}
	return clean, nil
}

// enter makes the directory called name the root, so that links in the tar reach nothing beside it. An earlier copy may
// have brought a link of that name: it is replaced, never followed.
func (u *unpacker) enter(h *tar.Header, name string) error {
	made, err := u.mkdir(name)
	if err != nil {
		return err
	}
	if made && u.archive {
		if err := u.root.Lchown(name, h.Uid, h.Gid); err != nil {
			return err
		}
	}
	want, err := u.root.Lstat(name)
	if err != nil {
		return err
	}
	root, err := u.root.OpenRoot(name)
	if err != nil {
		return err
	}
	parent := u.root
	u.root = root
	if err := parent.Close(); err != nil {
		return err
	}
	// OpenRoot follows links.
	if got, err := root.Stat("."); err != nil || !os.SameFile(want, got) {
		return errors.Join(errors.New("somebody else changes it at the same time"), err)
	}
	if !made {
		return nil // it keeps its mode and time
	}
	return u.atEnd(h, ".")
}

// entry makes one file, directory or link.
func (u *unpacker) entry(tr *tar.Reader, h *tar.Header, name string) error {
	var err error
	switch h.Typeflag {
	case tar.TypeDir:
		err = u.dir(h, name)
	case tar.TypeReg:
		err = u.file(tr, h, name)
	case tar.TypeSymlink:
		err = u.link(name, func() error { return u.root.Symlink(h.Linkname, name) })
	case tar.TypeLink:
		err = u.hardLink(h, name)
	default:
		u.warn(fmt.Sprintf("left out %s: it is a device, pipe or other special file", name))
		return nil
	}
	if err == nil && u.archive {
		err = u.root.Lchown(name, h.Uid, h.Gid)
	}
	if err == nil && h.Typeflag == tar.TypeReg {
		// After the owner: changing that may clear bits.
		err = errors.Join(u.root.Chmod(name, mode(h)), u.root.Chtimes(name, time.Time{}, h.ModTime))
	}
	if err != nil {
		return fmt.Errorf("cannot copy %s: %w", name, err)
	}
	return nil
}

// mode is the permissions, without the bits that would lend a file's owner's rights to whoever runs it.
func mode(h *tar.Header) fs.FileMode { return fs.FileMode(h.Mode) & fs.ModePerm }

func (u *unpacker) dir(h *tar.Header, name string) error {
	if _, err := u.mkdir(name); err != nil {
		return err
	}
	return u.atEnd(h, name)
}

// mkdir makes a directory, unless there is one already, in place of any file or link.
func (u *unpacker) mkdir(name string) (made bool, err error) {
	info, err := u.root.Lstat(name)
	if err == nil && info.IsDir() {
		return false, nil
	}
	if err := u.makeWay(name); err != nil {
		return false, err
	}
	return true, u.root.Mkdir(name, 0o700)
}

// atEnd notes the mode and time a directory is to have.
func (u *unpacker) atEnd(h *tar.Header, name string) error {
	if u.kept += len(name) + dirBytes; u.kept > maxDirBytes {
		return errors.New("the sandbox sent more directories than can be kept in mind: copy them in parts")
	}
	// The name may be part of a long string.
	u.dirs = append(u.dirs, dirEnd{strings.Clone(name), mode(h), h.ModTime})
	return nil
}

// finishDirs sets modes and times at last: before, a directory must be writable, and filling it changes its time.
func (u *unpacker) finishDirs() error {
	for _, d := range slices.Backward(u.dirs) {
		err := errors.Join(u.root.Chmod(d.name, d.mode), u.root.Chtimes(d.name, time.Time{}, d.mtime))
		if errors.Is(err, fs.ErrNotExist) {
			// A later entry of the same name replaced it.
			continue
		}
		if err != nil {
			return fmt.Errorf("cannot copy %s: %w", d.name, err)
		}
	}
	return nil
}

func (u *unpacker) file(tr *tar.Reader, h *tar.Header, name string) error {
	if err := u.makeWay(name); err != nil {
		return err
	}
	// Exclusive: never through a link that appeared meanwhile.
	const flags, private = os.O_WRONLY | os.O_CREATE | os.O_EXCL, 0o600
	f, err := u.root.OpenFile(name, flags, private)
	if weaken.Without("stay below the destination") {
		f, err = os.OpenFile(filepath.Join(u.root.Name(), name), flags, private)
	}
	if err != nil {
		return err
	}
	_, err = io.Copy(f, tr)
	return errors.Join(err, f.Close())
}

func (u *unpacker) link(name string, make func() error) error {
	if err := u.makeWay(name); err != nil {
		return err
	}
	return make()
}

func (u *unpacker) hardLink(h *tar.Header, name string) error {
	if u.top == "" {
		return errors.New("the sandbox sent a hard link where a file was asked for")
	}
	// Named like an entry.
	old, err := below(u.top, h.Linkname)
	if err != nil {
		return err
	}
	return u.link(name, func() error { return u.root.Link(old, name) })
}

// makeWay removes the file or link that is where something must go. A directory that is not empty stays, and is an error,
// and so is what was put there to be opened, not to be copied over.
func (u *unpacker) makeWay(name string) error {
	info, err := u.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if isSpecial(info.Mode()) {
		return errSpecial
	}
	return u.root.Remove(name)
}

var errSpecial = errors.New("there is a device, pipe, socket or other special file: remove it, or choose another destination")

func isSpecial(m fs.FileMode) bool {
	return m.Type() != 0 && m.Type() != fs.ModeDir && m.Type() != fs.ModeSymlink
}
