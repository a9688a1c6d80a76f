package tardir

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestWrite(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to make devices and files of others: run the tests as root")
	}
	dir := filepath.Join(t.TempDir(), "root")
	at := func(name string) string { return filepath.Join(dir, name) }
	mtime := time.Unix(1_500_000_000, 123_000_000)
	socket := at("socket")
	listener := (*net.UnixListener)(nil)
	for _, err := range []error{
		os.MkdirAll(at("d/e"), 0o750),
		os.WriteFile(at("d/file"), []byte("content"), 0o640),
		os.Chown(at("d/file"), 5, 70_000),
		os.Chtimes(at("d/file"), mtime, mtime),
		unix.Lsetxattr(at("d/file"), "user.x", []byte("\x00y"), 0),
		os.Link(at("d/file"), at("a-link")),
		os.Symlink("/etc/shadow", at("symlink")),
		unix.Mknod(at("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		unix.Mkfifo(at("fifo"), 0o600),
		os.Chmod(at("d/e"), 0o1777|os.ModeSticky),
		os.WriteFile(at("empty"), nil, 0o600),
		func() (err error) {
			listener, err = net.ListenUnix("unix", &net.UnixAddr{Name: socket, Net: "unix"})
			return err
		}(),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	defer listener.Close()

	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	var one, two bytes.Buffer
	if err := errors.Join(Write(&one, dir), Write(&two, link)); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(one.Bytes(), two.Bytes()) {
		t.Error("two tars of one directory differ")
	}
	got := map[string]*tar.Header{}
	var names []string
	r := tar.NewReader(&one)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		got[h.Name] = h
		names = append(names, h.Name)
		if h.Name == "a-link" {
			if data, err := io.ReadAll(r); err != nil || string(data) != "content" {
				t.Errorf("content %q, %v", data, err)
			}
		}
	}
	if want := []string{"./", "a-link", "d/", "d/e/", "d/file", "empty", "fifo", "null", "symlink"}; !slices.Equal(names, want) {
		t.Fatalf("names %v, want %v", names, want)
	}
	f := got["a-link"]
	if f.Mode != 0o640 || f.Uid != 5 || f.Gid != 70_000 || !f.ModTime.Equal(mtime) || f.PAXRecords["SCHILY.xattr.user.x"] != "\x00y" {
		t.Errorf("file %+v", f)
	}
	if h := got["d/file"]; h.Typeflag != tar.TypeLink || h.Linkname != "a-link" {
		t.Errorf("hard link %+v", h)
	}
	if h := got["symlink"]; h.Typeflag != tar.TypeSymlink || h.Linkname != "/etc/shadow" {
		t.Errorf("symbolic link %+v", h)
	}
	if h := got["null"]; h.Typeflag != tar.TypeChar || h.Devmajor != 1 || h.Devminor != 3 {
		t.Errorf("device %+v", h)
	}
	if h := got["d/e/"]; h.Mode != 0o1777 {
		t.Errorf("directory %+v", h)
	}
	if h := got["fifo"]; h.Typeflag != tar.TypeFifo {
		t.Errorf("fifo %+v", h)
	}
}

func TestWriteFailures(t *testing.T) {
	if err := Write(io.Discard, filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
	full := errors.New("full")
	if err := Write(writerFunc(func([]byte) (int, error) { return 0, full }), t.TempDir()); !errors.Is(err, full) {
		t.Errorf("got %v", err)
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }
