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
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) cpCommand() *cobra.Command {
	var o copyOptions
	cmd := &cobra.Command{
		Use:   "cp [flags] SRC DST",
		Short: "Copy files into or out of a running workload",
		Long: `Cp copies a file or a directory; one of SRC and DST is WORKLOAD:PATH. A directory that exists as DST gets SRC inside it,
unless SRC ends with /. which means its contents. - is a tar on standard input or output. What is copied belongs to root in
the sandbox, and here to whoever runs sandboxctl, unless -a is given; setuid bits and devices never come out of a sandbox.`,
		Example: `  sandboxctl cp config.yaml web:/etc/app/
  sandboxctl cp web:/var/log/app ./logs
  sandboxctl cp web:/srv/. site
  sandboxctl cp web:/srv - | tar t`,
		Args: exactArgs(2, "SRC or DST"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			src, dst := parsePlace(args[0]), parsePlace(args[1])
			switch {
			case src.ref != "" && dst.ref != "":
				return errors.New("cannot copy between workloads: copy to a file here first, or pipe: sandboxctl cp A:/x - | sandboxctl cp - B:/y")
			case src.ref == "" && dst.ref == "":
				return errors.New("cannot copy: neither SRC nor DST is in a workload: write WORKLOAD:PATH for one of them")
			case dst.ref != "":
				return a.copyIn(ctx, c, src.path, dst, o)
			}
			return a.copyOut(ctx, c, src, dst.path, o)
		}),
	}
	boolFlag(cmd.Flags(), &o.archive, "archive", "a", "keep owners, as numbers")
	boolFlag(cmd.Flags(), &o.followLink, "follow-link", "L", "if SRC is a symbolic link here, copy what it points to")
	return cmd
}

type copyOptions struct{ archive, followLink bool }

// place is one end of a copy: in a workload, or here when ref is empty.
type place struct{ ref, path string }

// parsePlace: what begins with / or . is here, as docker has it, so that a file with a colon can be named.
func parsePlace(s string) place {
	ref, p, ok := strings.Cut(s, ":")
	if !ok || ref == "" || s[0] == '/' || s[0] == '.' {
		return place{path: s}
	}
	return place{ref: ref, path: p}
}

// absolute is a path in a sandbox, where relative ones begin at the root. Whether it ends with / or /. is told apart.
func absolute(p string) (clean string, slash, contents bool) {
	slash = strings.HasSuffix(p, "/")
	contents = p == "." || strings.HasSuffix(p, "/.")
	return path.Clean("/" + p), slash, contents
}

// target is where a copy goes: into dir, under name; "." puts the contents of a directory into dir itself.
type target struct{ dir, name string }

// existing is what is at a destination.
type existing int

const (
	nothing existing = iota
	aFile
	aDir
)

// placeCopy decides by docker's rules where a copy of src goes; base is src's own name, dst its destination.
func placeCopy(srcIsDir, srcContents bool, base string, dst string, dstSlash bool, found existing) (target, error) {
	dir, name := path.Split(dst)
	if dir = path.Clean(dir); name == "" {
		name = "."
	}
	switch {
	case found == aDir && srcIsDir && srcContents:
		return target{dir: dst, name: "."}, nil
	case found == aDir:
		return target{dir: dst, name: base}, nil
	case found == aFile && srcIsDir:
		return target{}, fmt.Errorf("cannot copy a directory over %s, which is a file", dst)
	case found == aFile && dstSlash:
		return target{}, fmt.Errorf("cannot copy into %s, which is no directory", dst)
	case found == nothing && !srcIsDir && dstSlash:
		return target{}, fmt.Errorf("cannot copy into %s: there is no such directory: make it first, or leave out the / at the end", dst)
	}
	// A file replaces, a directory is made.
	return target{dir: dir, name: name}, nil
}

// copyIn copies from here into a sandbox.
func (a *app) copyIn(ctx context.Context, c *client.Client, src string, dst place, o copyOptions) error {
	dstPath, slash, _ := absolute(dst.path)
	found, err := lookIn(ctx, c, dst.ref, dstPath)
	if err != nil {
		return err
	}
	if src == "-" {
		if found != aDir {
			return fmt.Errorf("cannot unpack a tar at %s: it is no directory of the sandbox", dstPath)
		}
		return c.CopyIn(ctx, dst.ref, dstPath, a.stdin)
	}
	stat := os.Lstat
	if o.followLink || strings.HasSuffix(src, "/") || strings.HasSuffix(src, "/.") {
		stat = os.Stat
	}
	info, err := stat(src)
	if err != nil {
		return fmt.Errorf("cannot copy: %w", err)
	}
	full, err := filepath.Abs(src)
	if err != nil {
		return fmt.Errorf("cannot copy: %w", err)
	}
	t, err := placeCopy(info.IsDir(), src == "." || strings.HasSuffix(src, "/."), filepath.Base(full), dstPath, slash, found)
	if err != nil {
		return err
	}
	if info.Mode()&fs.ModeSymlink == 0 {
		// With -L: what the link points to, under the link's name.
		if full, err = filepath.EvalSymlinks(full); err != nil {
			return fmt.Errorf("cannot copy: %w", err)
		}
	}
	archive := newTarReader(func(w *tar.Writer) error { return packTree(ctx, w, full, t.name, o.archive) })
	defer archive.Close()
	return c.CopyIn(ctx, dst.ref, t.dir, archive)
}

// errSeen ends a stream of which enough was seen.
var errSeen = errors.New("seen")

// lookIn finds out what is at a path in a sandbox: the first entry of its tar tells, the rest is not fetched.
func lookIn(ctx context.Context, c *client.Client, ref, p string) (existing, error) {
	found, err := nothing, error(nil)
	err = withTar(ctx, c, ref, p, func(tr *tar.Reader) error {
		header, err := tr.Next()
		if err != nil {
			return orTarError(err)
		}
		found = aFile
		if header.Typeflag == tar.TypeDir {
			found = aDir
		}
		return errSeen
	})
	switch {
	case errors.Is(err, errSeen):
		return found, nil
	case status.Code(err) == codes.NotFound, isMissing(err):
		// Also when there is no such workload: the copy itself will say so.
		return nothing, nil
	}
	return nothing, err
}

// isMissing: the agent's account of a path that is not there. The API has no reason for it.
func isMissing(err error) bool {
	var e *client.Error
	return errors.As(err, &e) && e.Code == codes.InvalidArgument && e.Field == "path" && strings.HasSuffix(e.Message, "no such file or directory")
}

// withTar calls fn with the tar of a path in a sandbox. When fn returns the rest is not fetched.
func withTar(ctx context.Context, c *client.Client, ref, p string, fn func(*tar.Reader) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r, w := io.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.CloseWithError(c.CopyOut(ctx, ref, p, w))
	}()
	err := fn(tar.NewReader(r))
	cancel()
	r.Close()
	<-done
	return err
}

// copyOut copies from a sandbox to here.
func (a *app) copyOut(ctx context.Context, c *client.Client, src place, dst string, o copyOptions) error {
	srcPath, _, contents := absolute(src.path)
	if dst == "-" {
		if isTerminal(a.stdout) {
			return errors.New("cannot write a tar to a terminal: send it to a file or a program")
		}
		return c.CopyOut(ctx, src.ref, srcPath, a.stdout)
	}
	return withTar(ctx, c, src.ref, srcPath, func(tr *tar.Reader) error {
		first, err := tr.Next()
		if err != nil {
			return orTarError(err)
		}
		base := path.Base(srcPath)
		if base == "/" {
			contents = true
		}
		found, resolved, err := lookHere(dst)
		if err != nil {
			return err
		}
		t, err := placeCopy(first.Typeflag == tar.TypeDir, contents, base, resolved, strings.HasSuffix(dst, "/"), found)
		if err != nil {
			return err
		}
		u := &unpacker{archive: o.archive, warn: func(s string) { fmt.Fprintln(a.stderr, "sandboxctl: "+clean(s)) }}
		return u.unpack(ctx, tr, first, t)
	})
}

// orTarError passes on what the daemon said; what the sandbox sent instead of a tar is the sandbox's fault.
func orTarError(err error) error {
	var e *client.Error
	if errors.As(err, &e) {
		return err
	}
	return fmt.Errorf("cannot read what the sandbox sent: %w", err)
}

// lookHere finds out what is at a path here, and where it really is: a link given as DST is followed, as docker does.
func lookHere(p string) (existing, string, error) {
	full, err := filepath.Abs(p)
	if err != nil {
		return nothing, "", fmt.Errorf("cannot copy: %w", err)
	}
	info, err := os.Stat(full)
	if errors.Is(err, fs.ErrNotExist) {
		return nothing, full, nil
	}
	if err != nil {
		return nothing, "", fmt.Errorf("cannot copy: %w", err)
	}
	if full, err = filepath.EvalSymlinks(full); err != nil {
		return nothing, "", fmt.Errorf("cannot copy: %w", err)
	}
	switch {
	case info.IsDir():
		return aDir, full, nil
	case isSpecial(info.Mode()):
		return nothing, "", fmt.Errorf("cannot copy to %s: %w", p, errSpecial)
	}
	return aFile, full, nil
}
