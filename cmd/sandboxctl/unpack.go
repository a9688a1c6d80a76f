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
)

const (
	// maxEntries bounds how many files one copy may bring: a sandbox could send names for ever.
	maxEntries = 8 << 20
	// maxDirs bounds the directories whose times and modes are set at the end, and kept in memory until then.
	maxDirs = 1 << 20
)

// unpacker unpacks the tar of a sandbox, which may be hostile, below one place. Every path is resolved by an os.Root, so
// that neither names nor links lead out of it; nothing gets setuid bits, devices are not made, owners are not changed
// unless asked.
type unpacker struct {
	archive bool
	warn    func(string)

	root *os.Root
	top  string        // the name every entry begins with
	dirs []*tar.Header // with names below root, in the order they came
}

// unpack puts first and what follows it at t.
func (u *unpacker) unpack(ctx context.Context, tr *tar.Reader, first *tar.Header, t target) (err error) {
	isDir := first.Typeflag == tar.TypeDir
	if isDir && t.name != "." {
		// The root is the new directory itself, so that links in the tar reach nothing beside it.
		t = target{dir: filepath.Join(t.dir, t.name), name: "."}
		err := os.Mkdir(t.dir, 0o700)
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return fmt.Errorf("cannot copy: %w", err)
		}
		if err == nil {
			// One that was there keeps its mode and time.
			u.dirs = append(u.dirs, withName(first, "."))
		}
	}
	if u.root, err = os.OpenRoot(t.dir); err != nil {
		return fmt.Errorf("cannot copy: %w", err)
	}
	defer u.root.Close()
	if !isDir {
		return u.entry(tr, first, t.name)
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

func withName(h *tar.Header, name string) *tar.Header {
	c := *h
	c.Name = name
	return &c
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
	info, err := u.root.Lstat(name)
	switch {
	case err == nil && !info.IsDir():
		if err := u.root.Remove(name); err != nil {
			return err
		}
		fallthrough
	case errors.Is(err, fs.ErrNotExist):
		if err := u.root.Mkdir(name, 0o700); err != nil {
			return err
		}
	case err != nil:
		return err
	}
	if len(u.dirs) >= maxDirs {
		return fmt.Errorf("the sandbox sent more than %d directories", maxDirs)
	}
	u.dirs = append(u.dirs, withName(h, name))
	return nil
}

// finishDirs sets modes and times at last: before, a directory must be writable, and filling it changes its time.
func (u *unpacker) finishDirs() error {
	for _, h := range slices.Backward(u.dirs) {
		err := errors.Join(u.root.Chmod(h.Name, mode(h)), u.root.Chtimes(h.Name, time.Time{}, h.ModTime))
		if errors.Is(err, fs.ErrNotExist) {
			// A later entry of the same name replaced it.
			continue
		}
		if err != nil {
			return fmt.Errorf("cannot copy %s: %w", h.Name, err)
		}
	}
	return nil
}

func (u *unpacker) file(tr *tar.Reader, h *tar.Header, name string) error {
	if err := u.makeWay(name); err != nil {
		return err
	}
	// Exclusive: never through a link that appeared meanwhile.
	f, err := u.root.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
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

// makeWay removes what is where a file or link must go. A directory that is not empty stays, and is an error.
func (u *unpacker) makeWay(name string) error {
	err := u.root.Remove(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
