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

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// packTree writes a file or directory here as a tar whose first entry is called name; "." stands for a directory whose
// contents are meant. Without owners everything belongs to root.
func packTree(ctx context.Context, w *tar.Writer, src, name string, owners bool) error {
	// A root, not paths: what is read is below src even while others rename things in it.
	root, err := os.OpenRoot(filepath.Dir(src))
	if err != nil {
		return fmt.Errorf("cannot copy: %w", err)
	}
	defer root.Close()
	top := filepath.Base(src)
	if src == "/" {
		top = "."
	}
	return fs.WalkDir(root.FS(), top, func(file string, _ fs.DirEntry, err error) error {
		if err != nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		rest, err := filepath.Rel(top, file)
		if err != nil {
			return err
		}
		return tarFile(w, root, file, path.Join(name, filepath.ToSlash(rest)), owners)
	})
}

// tarFile writes one entry. Sockets are left out, as tar does: there is nothing in them.
func tarFile(w *tar.Writer, root *os.Root, file, name string, owners bool) error {
	info, err := root.Lstat(file)
	if err != nil {
		return fmt.Errorf("cannot copy: %w", err)
	}
	link := ""
	switch info.Mode().Type() {
	case fs.ModeSocket:
		return nil
	case fs.ModeSymlink:
		if link, err = root.Readlink(file); err != nil {
			return fmt.Errorf("cannot copy: %w", err)
		}
	}
	header, err := tar.FileInfoHeader(info, link)
	if err != nil {
		return fmt.Errorf("cannot copy %s: %w", file, err)
	}
	header.Name = name
	if info.IsDir() {
		header.Name += "/"
	}
	header.Uname, header.Gname = "", ""
	if !owners {
		header.Uid, header.Gid = 0, 0
	}
	if !info.Mode().IsRegular() {
		return w.WriteHeader(header)
	}
	f, err := root.Open(file)
	if weaken.Without("stay below the source") {
		f, err = os.Open(filepath.Join(root.Name(), file))
	}
	if err != nil {
		return fmt.Errorf("cannot copy: %w", err)
	}
	defer f.Close()
	if err := w.WriteHeader(header); err != nil {
		return err
	}
	n, err := io.CopyN(w, f, header.Size)
	if errors.Is(err, io.EOF) {
		return fmt.Errorf("cannot copy %s: it shrank from %d to %d bytes meanwhile", file, header.Size, n)
	}
	return err
}
