package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) imageImportCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "import [flags] FILE|DIR|-",
		Short: "Import an archive; print the image's digest",
		Long: `Import takes what docker save writes, an OCI layout (a directory or a tar of it), or a tar of a root file system, also
compressed; - is standard input. An archive that names itself needs no --name.`,
		Example: `  sandboxctl image import debian.tar
  docker save debian:12 | sandboxctl image import -
  mmdebstrap --variant=minbase bookworm - | sandboxctl image import --name debian:12 -`,
		Args: exactArgs(1, "FILE, DIR or -"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			archive, err := a.openArchive(ctx, args[0])
			if err != nil {
				return err
			}
			defer archive.Close()
			image, err := c.ImportImage(ctx, name, archive)
			if err != nil {
				return err
			}
			return a.printImage(image)
		}),
	}
	cmd.Flags().StringVar(&name, "name", "", "name to give it, such as debian:12")
	return cmd
}

// openArchive opens what is to be imported; a directory becomes a tar.
func (a *app) openArchive(ctx context.Context, path string) (io.ReadCloser, error) {
	if path == "-" {
		return io.NopCloser(a.stdin), nil
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read archive: %w", err)
	}
	if !info.IsDir() {
		f, err := os.Open(path)
		if err != nil {
			return nil, fmt.Errorf("cannot read archive: %w", err)
		}
		return f, nil
	}
	if _, err := os.Stat(filepath.Join(path, "oci-layout")); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot import directory %s: it is no OCI layout; a root file system goes in as a tar: tar -C %s --xattrs -c . | sandboxctl image import --name NAME -", path, path)
	}
	return newTarReader(func(w *tar.Writer) error { return tarLayout(ctx, w, path) }), nil
}

// tarReader is the reading end of a tar that a goroutine writes; Close ends and waits for it.
type tarReader struct {
	*io.PipeReader
	done chan struct{}
}

func newTarReader(write func(*tar.Writer) error) *tarReader {
	r, w := io.Pipe()
	t := &tarReader{PipeReader: r, done: make(chan struct{})}
	go func() {
		defer close(t.done)
		tw := tar.NewWriter(w)
		err := write(tw)
		if err == nil {
			err = tw.Close()
		}
		w.CloseWithError(err)
	}()
	return t
}

func (t *tarReader) Close() error {
	err := t.PipeReader.Close()
	<-t.done
	return err
}

// tarLayout writes the files of an OCI layout, which has nothing but regular files and directories.
func tarLayout(ctx context.Context, w *tar.Writer, dir string) error {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return fs.WalkDir(root.FS(), ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || ctx.Err() != nil {
			return errors.Join(err, ctx.Err())
		}
		if !entry.Type().IsRegular() {
			if entry.IsDir() {
				return nil
			}
			return fmt.Errorf("cannot import %s: %s is neither file nor directory, which no OCI layout has", dir, name)
		}
		return tarFile(w, root, name, name, false)
	})
}
