package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func writeFile(t *testing.T, path, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestPlaces(t *testing.T) {
	for s, want := range map[string]place{
		"web:/etc": {"web", "/etc"}, "web:etc": {"web", "etc"}, "web:": {"web", ""}, "file": {"", "file"}, "-": {"", "-"},
		"./a:b": {"", "./a:b"}, "/a:b": {"", "/a:b"}, ":x": {"", ":x"}, "web:/a:b": {"web", "/a:b"},
	} {
		if got := parsePlace(s); got != want {
			t.Errorf("parsePlace(%q) = %+v, want %+v", s, got, want)
		}
	}
}

// Docker's rules, a row for each.
func TestWhereACopyGoes(t *testing.T) {
	for _, c := range []struct {
		name     string
		dir      bool
		contents bool
		dst      string
		slash    bool
		found    existing
		want     target
		fails    bool
	}{
		{"file to new name", false, false, "/d/new", false, nothing, target{"/d", "new"}, false},
		{"file over file", false, false, "/d/old", false, aFile, target{"/d", "old"}, false},
		{"file into directory", false, false, "/d", false, aDir, target{"/d", "base"}, false},
		{"file into directory that is not there", false, false, "/d/none", true, nothing, target{}, true},
		{"file into a file", false, false, "/d/old", true, aFile, target{}, true},
		{"directory to new name", true, false, "/d/new", false, nothing, target{"/d", "new"}, false},
		{"directory to new name with slash", true, false, "/d/new", true, nothing, target{"/d", "new"}, false},
		{"directory over file", true, false, "/d/old", false, aFile, target{}, true},
		{"directory into directory", true, false, "/d", false, aDir, target{"/d", "base"}, false},
		{"contents into directory", true, true, "/d", false, aDir, target{"/d", "."}, false},
		{"contents to new name", true, true, "/d/new", false, nothing, target{"/d", "new"}, false},
		{"into the root", true, false, "/", true, aDir, target{"/", "base"}, false},
		{"contents into the root", true, true, "/", true, aDir, target{"/", "."}, false},
		{"new in the root", false, false, "/new", false, nothing, target{"/", "new"}, false},
	} {
		got, err := placeCopy(c.dir, c.contents, "base", c.dst, c.slash, c.found)
		if (err != nil) != c.fails || got != c.want {
			t.Errorf("%s: %+v, %v; want %+v, failing %v", c.name, got, err, c.want, c.fails)
		}
	}
}

// makeTar writes a tar as a sandbox could.
func makeTar(t *testing.T, headers ...tar.Header) *tar.Reader {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		body := ""
		if h.Typeflag == tar.TypeReg {
			body = "body of " + h.Name
			h.Size = int64(len(body))
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return tar.NewReader(&b)
}

func unpackAt(t *testing.T, tr *tar.Reader, to target) (warnings []string, err error) {
	t.Helper()
	first, err := tr.Next()
	if err != nil {
		t.Fatal(err)
	}
	u := &unpacker{warn: func(s string) { warnings = append(warnings, s) }}
	return warnings, u.unpack(t.Context(), tr, first, to)
}

func TestUnpack(t *testing.T) {
	dir := t.TempDir()
	when := time.Unix(1_000_000_000, 0)
	warnings, err := unpackAt(t, makeTar(t,
		tar.Header{Typeflag: tar.TypeDir, Name: "app/", Mode: 0o555, ModTime: when},
		tar.Header{Typeflag: tar.TypeReg, Name: "app/file", Mode: 0o6754, ModTime: when},
		tar.Header{Typeflag: tar.TypeDir, Name: "app/sub/", Mode: 0o500, ModTime: when},
		tar.Header{Typeflag: tar.TypeReg, Name: "app/sub/deep"},
		tar.Header{Typeflag: tar.TypeSymlink, Name: "app/link", Linkname: "/etc/passwd"},
		tar.Header{Typeflag: tar.TypeLink, Name: "app/hard", Linkname: "app/file"},
		tar.Header{Typeflag: tar.TypeChar, Name: "app/null", Devmajor: 1, Devminor: 3},
		tar.Header{Typeflag: tar.TypeFifo, Name: "app/pipe"},
	), target{dir, "new"})
	if err != nil {
		t.Fatal(err)
	}
	root := filepath.Join(dir, "new")
	if b, err := os.ReadFile(filepath.Join(root, "sub/deep")); err != nil || string(b) != "body of app/sub/deep" {
		t.Errorf("a file in a directory: %q %v", b, err)
	}
	file, err := os.Lstat(filepath.Join(root, "file"))
	if err != nil {
		t.Fatal(err)
	}
	// Neither setuid nor setgid comes out of a sandbox.
	if file.Mode() != 0o754 || !file.ModTime().Equal(when) {
		t.Errorf("a file has mode %v and time %v", file.Mode(), file.ModTime())
	}
	if hard, err := os.Lstat(filepath.Join(root, "hard")); err != nil || !os.SameFile(file, hard) {
		t.Errorf("a hard link: %v", err)
	}
	if link, err := os.Readlink(filepath.Join(root, "link")); err != nil || link != "/etc/passwd" {
		t.Errorf("a link: %q %v", link, err)
	}
	for name, mode := range map[string]fs.FileMode{".": 0o555, "sub": 0o500} {
		if info, err := os.Lstat(filepath.Join(root, name)); err != nil || info.Mode().Perm() != mode || !info.ModTime().Equal(when) {
			t.Errorf("directory %s: %v %v", name, info, err)
		}
	}
	for _, name := range []string{"null", "pipe"} {
		if _, err := os.Lstat(filepath.Join(root, name)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s came out of the sandbox", name)
		}
	}
	if len(warnings) != 2 {
		t.Errorf("warnings %q, want one for each left out", warnings)
	}
}

func TestUnpackFile(t *testing.T) {
	dir := t.TempDir()
	writeFile(t, dir+"/old", "old")
	for _, name := range []string{"old", "new"} {
		if _, err := unpackAt(t, makeTar(t, tar.Header{Typeflag: tar.TypeReg, Name: "f"}), target{dir, name}); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != "body of f" {
			t.Errorf("%s: %q %v", name, b, err)
		}
	}
}

// What was there keeps what the copy does not bring, and its own mode.
func TestUnpackIntoExisting(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	writeFile(t, dir+"/kept", "kept")
	writeFile(t, dir+"/file", "old")
	writeFile(t, dir+"/becomes-dir", "old")
	if _, err := unpackAt(t, makeTar(t,
		tar.Header{Typeflag: tar.TypeDir, Name: "app/", Mode: 0o700},
		tar.Header{Typeflag: tar.TypeReg, Name: "app/file"},
		tar.Header{Typeflag: tar.TypeDir, Name: "app/becomes-dir/"},
	), target{dir, "."}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"kept": "kept", "file": "body of app/file"} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != want {
			t.Errorf("%s: %q %v", name, b, err)
		}
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o711 {
		t.Errorf("the destination: %v %v", info, err)
	}
	if info, err := os.Stat(dir + "/becomes-dir"); err != nil || !info.IsDir() {
		t.Errorf("a file a directory replaces: %v %v", info, err)
	}
}

// What a hostile sandbox could send to write or read outside the destination. Each archive is followed by a look at a
// file outside, which must be as before.
func TestUnpackStaysInside(t *testing.T) {
	top := tar.Header{Typeflag: tar.TypeDir, Name: "app/"}
	for name, headers := range map[string][]tar.Header{
		"dots":               {top, {Typeflag: tar.TypeReg, Name: "app/../../outside/victim"}},
		"dots first":         {top, {Typeflag: tar.TypeReg, Name: "../outside/victim"}},
		"absolute":           {top, {Typeflag: tar.TypeReg, Name: "/etc/sandboxctl-test-victim"}},
		"beside":             {top, {Typeflag: tar.TypeReg, Name: "application/victim"}},
		"link up":            {top, {Typeflag: tar.TypeSymlink, Name: "app/l", Linkname: "../outside"}, {Typeflag: tar.TypeReg, Name: "app/l/victim"}},
		"absolute link":      {top, {Typeflag: tar.TypeSymlink, Name: "app/l", Linkname: "OUTSIDE"}, {Typeflag: tar.TypeReg, Name: "app/l/victim"}},
		"link to the file":   {top, {Typeflag: tar.TypeSymlink, Name: "app/l", Linkname: "OUTSIDE/victim"}, {Typeflag: tar.TypeReg, Name: "app/l"}},
		"two links":          {top, {Typeflag: tar.TypeSymlink, Name: "app/a", Linkname: "b"}, {Typeflag: tar.TypeSymlink, Name: "app/b", Linkname: "../outside"}, {Typeflag: tar.TypeReg, Name: "app/a/victim"}},
		"directory by link":  {top, {Typeflag: tar.TypeSymlink, Name: "app/l", Linkname: "../outside"}, {Typeflag: tar.TypeDir, Name: "app/l/", Mode: 0o777}},
		"hard link out":      {top, {Typeflag: tar.TypeLink, Name: "app/l", Linkname: "app/../../outside/victim"}, {Typeflag: tar.TypeReg, Name: "app/l"}},
		"hard link absolute": {top, {Typeflag: tar.TypeLink, Name: "app/l", Linkname: "OUTSIDE/victim"}},
		"hard link by link":  {top, {Typeflag: tar.TypeSymlink, Name: "app/d", Linkname: "../outside"}, {Typeflag: tar.TypeLink, Name: "app/l", Linkname: "app/d/victim"}},
		"top is a link":      {{Typeflag: tar.TypeSymlink, Name: "app", Linkname: "OUTSIDE"}, {Typeflag: tar.TypeReg, Name: "app/victim"}},
		"top twice":          {top, {Typeflag: tar.TypeSymlink, Name: "app", Linkname: "OUTSIDE"}, {Typeflag: tar.TypeReg, Name: "app/victim"}},
	} {
		t.Run(name, func(t *testing.T) {
			base := t.TempDir()
			outside := filepath.Join(base, "outside")
			writeFile(t, outside+"/victim", "precious")
			before, err := os.Stat(outside)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.Mkdir(filepath.Join(base, "dst"), 0o755); err != nil {
				t.Fatal(err)
			}
			for i := range headers {
				headers[i].Linkname = strings.ReplaceAll(headers[i].Linkname, "OUTSIDE", outside)
			}
			_, err = unpackAt(t, makeTar(t, headers...), target{filepath.Join(base, "dst"), "copy"})
			t.Logf("it said: %v", err)
			if b, err := os.ReadFile(outside + "/victim"); err != nil || string(b) != "precious" {
				t.Errorf("the file outside is now %q, %v", b, err)
			}
			if info, err := os.Stat(outside + "/victim"); err != nil || info.Sys().(*syscall.Stat_t).Nlink != 1 {
				t.Errorf("the file outside has another name now: %v", err)
			}
			if after, err := os.Stat(outside); err != nil || after.Mode() != before.Mode() {
				t.Errorf("the directory outside is now %v, %v", after, err)
			}
			if entries, err := os.ReadDir(base); err != nil || len(entries) != 2 {
				t.Errorf("there are now %v beside the destination, %v", entries, err)
			}
			if _, err := os.Lstat("/etc/sandboxctl-test-victim"); err == nil {
				t.Error("a file was made in /etc")
			}
		})
	}
}

// Copying twice is two archives: what the first puts beside the second's destination must not lead the second out.
func TestUnpackDoesNotFollowAnEarlierCopy(t *testing.T) {
	for name, link := range map[string]string{"absolute": "OUTSIDE", "relative": "../outside", "beside": "other", "dangling": "none"} {
		t.Run(name, func(t *testing.T) {
			base := t.TempDir()
			outside := filepath.Join(base, "outside")
			writeFile(t, outside+"/victim", "precious")
			writeFile(t, base+"/out/other/victim", "precious")
			to := target{filepath.Join(base, "out"), "srv"}
			planted := tar.Header{Typeflag: tar.TypeSymlink, Name: "srv", Linkname: strings.ReplaceAll(link, "OUTSIDE", outside)}
			if _, err := unpackAt(t, makeTar(t, planted), to); err != nil {
				t.Fatal(err)
			}
			if _, err := unpackAt(t, makeTar(t,
				tar.Header{Typeflag: tar.TypeDir, Name: "srv/", Mode: 0o777},
				tar.Header{Typeflag: tar.TypeReg, Name: "srv/victim"},
				tar.Header{Typeflag: tar.TypeReg, Name: "srv/more"},
			), to); err != nil {
				t.Error(err)
			}
			for _, dir := range []string{outside, base + "/out/other"} {
				if b, err := os.ReadFile(dir + "/victim"); err != nil || string(b) != "precious" {
					t.Errorf("%s/victim is now %q, %v", dir, b, err)
				}
				if _, err := os.Lstat(dir + "/more"); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("the copy went to %s", dir)
				}
			}
			if info, err := os.Lstat(base + "/out/srv"); err != nil || !info.IsDir() || info.Mode().Perm() != 0o777 {
				t.Errorf("the destination is %v, %v; want a directory", info, err)
			}
			if b, err := os.ReadFile(base + "/out/srv/victim"); err != nil || string(b) != "body of srv/victim" {
				t.Errorf("the copy has %q, %v", b, err)
			}
		})
	}
}

// What is not a file here is not replaced by one: it is there to be opened.
func TestSpecialFilesStay(t *testing.T) {
	dir := t.TempDir()
	pipe := filepath.Join(dir, "app")
	if err := errors.Join(syscall.Mkfifo(pipe, 0o600), os.Symlink("app", dir+"/link")); err != nil {
		t.Fatal(err)
	}
	for name, first := range map[string]tar.Header{
		"file":      {Typeflag: tar.TypeReg, Name: "app"},
		"directory": {Typeflag: tar.TypeDir, Name: "app/"},
		"link":      {Typeflag: tar.TypeSymlink, Name: "app", Linkname: "x"},
	} {
		if _, err := unpackAt(t, makeTar(t, first), target{dir, "app"}); !errors.Is(err, errSpecial) {
			t.Errorf("a %s over a pipe: %v", name, err)
		}
	}
	inside := makeTar(t, tar.Header{Typeflag: tar.TypeDir, Name: "top/"}, tar.Header{Typeflag: tar.TypeReg, Name: "top/app"})
	if _, err := unpackAt(t, inside, target{dir, "."}); !errors.Is(err, errSpecial) {
		t.Errorf("a file of a directory over a pipe: %v", err)
	}
	for _, p := range []string{pipe, dir + "/link", "/dev/null"} {
		if found, _, err := lookHere(p); !errors.Is(err, errSpecial) {
			t.Errorf("%s as a destination: %v, %v", p, found, err)
		}
	}
	if info, err := os.Lstat(pipe); err != nil || info.Mode().Type() != fs.ModeNamedPipe {
		t.Errorf("the pipe is now %v, %v", info, err)
	}
}

// A header may be a megabyte long, and a directory's is needed again at the end.
func TestUnpackKeepsLittleInMemory(t *testing.T) {
	const dirs, comment = 200, 512 << 10
	r := newTarReader(func(w *tar.Writer) error {
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "app/", Mode: 0o755})
		for i := range dirs {
			err = errors.Join(err, w.WriteHeader(&tar.Header{
				// A name that is not ASCII is in the same long record as the comment.
				Typeflag: tar.TypeDir, Name: "app/\u00e9" + strconv.Itoa(i) + "/", Mode: 0o755, Format: tar.FormatPAX,
				PAXRecords: map[string]string{"SANDBOX.comment": strings.Repeat("x", comment)},
			}))
		}
		return errors.Join(err, w.WriteHeader(&tar.Header{Typeflag: tar.TypeFifo, Name: "app/last"}))
	})
	defer r.Close()
	tr := tar.NewReader(r)
	first, err := tr.Next()
	if err != nil {
		t.Fatal(err)
	}
	inUse := func() uint64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before, after := inUse(), uint64(0)
	u := &unpacker{warn: func(string) { after = inUse() }} // at the last entry
	if err := u.unpack(t.Context(), tr, first, target{t.TempDir(), "copy"}); err != nil {
		t.Fatal(err)
	}
	if limit := before + dirs*comment/4; after == 0 || after > limit {
		t.Errorf("%d bytes in use, before it were %d", after, before)
	}
}

func TestUnpackBoundsDirectories(t *testing.T) {
	tr := makeTar(t, tar.Header{Typeflag: tar.TypeDir, Name: "app/"}, tar.Header{Typeflag: tar.TypeDir, Name: "app/one/"}, tar.Header{Typeflag: tar.TypeDir, Name: "app/two/"})
	first, err := tr.Next()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	u := &unpacker{warn: func(string) {}, kept: maxDirBytes - 2*(dirBytes+len("one"))}
	if err := u.unpack(t.Context(), tr, first, target{dir, "copy"}); err == nil || !strings.Contains(err.Error(), "more directories") {
		t.Errorf("one directory too many: %v", err)
	}
	if _, err := os.Stat(dir + "/copy/one"); err != nil {
		t.Errorf("the directory before: %v", err)
	}
}

func TestPackAndUnpack(t *testing.T) {
	src := filepath.Join(t.TempDir(), "src")
	writeFile(t, src+"/a/file", "content")
	if err := errors.Join(os.Symlink("file", src+"/a/link"), os.Chmod(src+"/a/file", 0o4755), syscall.Mkfifo(src+"/a/pipe", 0o600)); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"renamed": "renamed", ".": "."} {
		r := newTarReader(func(w *tar.Writer) error { return packTree(context.Background(), w, src, name, false) })
		tr := tar.NewReader(r)
		first, err := tr.Next()
		if err != nil || first.Name != want+"/" {
			t.Fatalf("first entry %v, %v; want %s/", first, err, want)
		}
		dst := t.TempDir()
		u := &unpacker{warn: func(string) {}}
		if err := u.unpack(t.Context(), tr, first, target{dst, "copy"}); err != nil {
			t.Fatal(err)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if b, err := os.ReadFile(dst + "/copy/a/link"); err != nil || string(b) != "content" {
			t.Errorf("%q %v", b, err)
		}
	}
	var names []string
	r := newTarReader(func(w *tar.Writer) error { return packTree(context.Background(), w, src, ".", false) })
	defer r.Close()
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if h.Uid != 0 || h.Gid != 0 || h.Uname != "" {
			t.Errorf("%s belongs to %d:%d (%s)", h.Name, h.Uid, h.Gid, h.Uname)
		}
		names = append(names, h.Name)
	}
	if got := strings.Join(names, " "); got != "./ a/ a/file a/link a/pipe" {
		t.Errorf("entries %q", got)
	}
}
