package image

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// file is everything about a file that an image must keep.
type file struct {
	Path     string
	Mode     uint32 // st_mode
	UID, GID uint32
	Size     int64
	Rdev     uint64
	Sec      int64
	Nsec     int64
	Link     string
	SHA      string
	Xattrs   map[string]string
	Nlink    uint64
	Ino      uint64 `json:",omitempty"`
}

const helperEnv = "IMAGE_TEST_HELPER"

// TestMain is also the entry of helpers, which run in a mount namespace of their own so that nothing stays mounted.
func TestMain(m *testing.M) {
	helper := os.Getenv(helperEnv)
	if helper == "" {
		os.Exit(m.Run())
	}
	err := map[string]func(args []string) error{"walk": walkHelper, "full": fullHelper, "kill": killHelper}[helper](os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// runHelper runs a helper of this binary in its own mount namespace and returns what it printed.
func runHelper(t testing.TB, helper string, args ...string) []byte {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount: run the tests as root")
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe", args...)
	cmd.Env = append(os.Environ(), helperEnv+"="+helper)
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	if err := cmd.Run(); err != nil {
		t.Fatalf("helper %s: %v\n%s", helper, err, errs.Bytes())
	}
	return out.Bytes()
}

// walkHelper mounts an EROFS file with the kernel and prints all its files.
func walkHelper(args []string) error {
	image, at := args[0], args[1]
	err := unix.Mount(image, at, "erofs", unix.MS_RDONLY|unix.MS_NODEV, "")
	if errors.Is(err, unix.ENOTBLK) { // before Linux 6.12
		var out []byte
		if out, err = exec.Command("mount", "-t", "erofs", "-o", "ro,nodev,loop", image, at).CombinedOutput(); err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
	}
	if err != nil {
		return fmt.Errorf("cannot mount %s: %w", image, err)
	}
	enc := json.NewEncoder(os.Stdout)
	return filepath.WalkDir(at, func(path string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		f, err := statFile(path)
		if err != nil {
			return err
		}
		name, err := filepath.Rel(at, path)
		f.Path = strconv.QuoteToASCII(name) // JSON keeps no bytes that are not UTF-8
		return errors.Join(err, enc.Encode(f))
	})
}

func statFile(path string) (file, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return file{}, err
	}
	f := file{
		Mode: st.Mode, UID: st.Uid, GID: st.Gid, Size: st.Size, Rdev: st.Rdev,
		Sec: st.Mtim.Sec, Nsec: st.Mtim.Nsec, Nlink: st.Nlink, Ino: st.Ino,
	}
	var err error
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		if f.SHA, err = shaFile(path); err != nil {
			return f, err
		}
	case unix.S_IFLNK:
		if f.Link, err = os.Readlink(path); err != nil {
			return f, err
		}
	}
	buf := make([]byte, 128<<10)
	n, err := unix.Llistxattr(path, buf)
	if err != nil || n == 0 {
		return f, err
	}
	f.Xattrs = map[string]string{}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(buf[:n]), "\x00"), "\x00") {
		value := make([]byte, 64<<10)
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return f, fmt.Errorf("%s of %s: %w", name, path, err)
		}
		f.Xattrs[name] = hex.EncodeToString(value[:n])
	}
	return f, nil
}

func shaFile(path string) (string, error) {
	r, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer r.Close()
	h := sha256.New()
	_, err = io.Copy(h, r)
	return hex.EncodeToString(h.Sum(nil)), err
}

// mounted gives the files of an EROFS file as the kernel shows them.
func mounted(t testing.TB, image string) map[string]file {
	t.Helper()
	dec := json.NewDecoder(bytes.NewReader(runHelper(t, "walk", image, t.TempDir())))
	files := map[string]file{}
	for {
		var f file
		err := dec.Decode(&f)
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if f.Path, err = strconv.Unquote(f.Path); err != nil {
			t.Fatal(err)
		}
		files[f.Path] = f
	}
}

// tarFiles gives the files of a tar, read in the plainest way: no whiteouts, every directory with an entry. Ino is the
// same for hard links.
func tarFiles(t testing.TB, r io.Reader) map[string]file {
	t.Helper()
	files := map[string]file{}
	inodes := map[string][]string{} // first name → all names
	tr := tar.NewReader(r)
	for {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Clean(hdr.Name)
		if hdr.Typeflag == tar.TypeLink {
			first := filepath.Clean(hdr.Linkname)
			for name, names := range inodes {
				if slices.Contains(names, first) {
					first = name
				}
			}
			f := files[first]
			f.Path = path
			files[path] = f
			inodes[first] = append(inodes[first], path)
			continue
		}
		files[path] = tarFile(t, path, hdr, tr)
		inodes[path] = []string{path}
	}
	ino := uint64(0)
	for _, names := range inodes {
		ino++
		for _, name := range names {
			f := files[name]
			f.Ino, f.Nlink = ino, uint64(len(names))
			files[name] = f
		}
	}
	for path, f := range files {
		if f.Mode&unix.S_IFMT != unix.S_IFDIR {
			continue
		}
		f.Nlink = 2
		for other, o := range files {
			if o.Mode&unix.S_IFMT == unix.S_IFDIR && other != "." && filepath.Dir(other) == path {
				f.Nlink++
			}
		}
		files[path] = f
	}
	return files
}

func tarFile(t testing.TB, path string, hdr *tar.Header, r io.Reader) file {
	t.Helper()
	f := file{
		Path: path, Mode: uint32(hdr.Mode) & 0o7777, UID: uint32(hdr.Uid), GID: uint32(hdr.Gid),
		Sec: hdr.ModTime.Unix(), Nsec: int64(hdr.ModTime.Nanosecond()),
	}
	switch hdr.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		f.Mode |= unix.S_IFREG
		h := sha256.New()
		var err error
		if f.Size, err = io.Copy(h, r); err != nil {
			t.Fatal(err)
		}
		f.SHA = hex.EncodeToString(h.Sum(nil))
	case tar.TypeDir:
		f.Mode |= unix.S_IFDIR
	case tar.TypeSymlink:
		f.Mode = unix.S_IFLNK | 0o777
		f.Link, f.Size = hdr.Linkname, int64(len(hdr.Linkname))
	case tar.TypeChar, tar.TypeBlock:
		f.Mode |= unix.S_IFCHR
		if hdr.Typeflag == tar.TypeBlock {
			f.Mode = f.Mode&^unix.S_IFMT | unix.S_IFBLK
		}
		f.Rdev = unix.Mkdev(uint32(hdr.Devmajor), uint32(hdr.Devminor))
	case tar.TypeFifo:
		f.Mode |= unix.S_IFIFO
	default:
		t.Fatalf("%s is of type %q", hdr.Name, hdr.Typeflag)
	}
	for key, value := range hdr.PAXRecords {
		if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			if f.Xattrs == nil {
				f.Xattrs = map[string]string{}
			}
			f.Xattrs[name] = hex.EncodeToString([]byte(value))
		}
	}
	return f
}

// compare checks that an image has exactly the files of a tar.
func compare(t *testing.T, want, got map[string]file) {
	t.Helper()
	sameIno := map[uint64]uint64{}
	inoUsed := map[uint64]uint64{}
	for _, path := range slices.Sorted(maps.Keys(want)) {
		w := want[path]
		g, ok := got[path]
		if !ok {
			t.Errorf("%s is not in the image", path)
			continue
		}
		if ino, seen := sameIno[w.Ino]; seen && ino != g.Ino {
			t.Errorf("%s has the inode %d, its other name %d", path, g.Ino, ino)
		}
		if ino, seen := inoUsed[g.Ino]; seen && ino != w.Ino {
			t.Errorf("%s shares an inode with a file that is another in the tar", path)
		}
		sameIno[w.Ino], inoUsed[g.Ino] = g.Ino, w.Ino
		if g.Ino == 0 {
			t.Errorf("%s is inode 0, which means deleted", path)
		}
		w.Ino, g.Ino = 0, 0
		if w.Mode&unix.S_IFMT == unix.S_IFDIR {
			g.Size = 0 // of the directory's own entries
		}
		wj, gj := mustJSON(t, w), mustJSON(t, g)
		if !bytes.Equal(wj, gj) {
			t.Errorf("%s differs:\n tar   %s\n image %s", path, wj, gj)
		}
	}
	for path := range got {
		if _, ok := want[path]; !ok {
			t.Errorf("%s is not in the tar", path)
		}
	}
}

// debianTar finds the Debian root file system that make test-assets builds.
func debianTar(t testing.TB) string {
	t.Helper()
	dir, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for ; ; dir = filepath.Dir(dir) {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			break
		}
		if dir == "/" {
			t.Fatal("no module root above the test's directory")
		}
	}
	path := filepath.Join(dir, ".cache", "images", "debian.tar")
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%v: make it with make test-assets", err)
	}
	return path
}

// A whole Debian, every file of it, as the kernel sees it.
func TestDebianIsKept(t *testing.T) {
	path := debianTar(t)
	r, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	want := tarFiles(t, r)
	if len(want) < 1000 {
		t.Fatalf("%s has only %d files", path, len(want))
	}
	if _, err := r.Seek(0, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	image, err := newStore(t).Import(t.Context(), r, "debian")
	if err != nil {
		t.Fatal(err)
	}
	sum, err := shaFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if image.Digest != "sha256:"+sum {
		t.Errorf("digest %s, the archive's is %s", image.Digest, sum)
	}
	compare(t, want, mounted(t, image.Path))
	fsck(t, image.Path)
	info, err := os.Stat(image.Path)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != 0o444 || info.Size() != image.SizeBytes || info.Size()%blockSize != 0 {
		t.Errorf("the file has mode %v and %d bytes, the record says %d", info.Mode(), info.Size(), image.SizeBytes)
	}
}

// capNetRaw is security.capability with cap_net_raw=ep, version 2, as setcap writes it for ping.
const capNetRaw = "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"

// acl is system.posix_acl_access with u::rw-,u:1000:r--,g::r--,m::r--,o::---.
const acl = "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x04\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff" +
	"\x10\x00\x04\x00\xff\xff\xff\xff\x20\x00\x00\x00\xff\xff\xff\xff"

// oddities are files that a root file system may have but Debian's happens not to.
func oddities(t testing.TB) []byte {
	pax := func(h tar.Header, records map[string]string) tar.Header {
		h.PAXRecords, h.Format = map[string]string{}, tar.FormatPAX
		for k, v := range records {
			h.PAXRecords[paxXattr+k] = v
		}
		return h
	}
	owned := func(h tar.Header, uid, gid int, mode int64) tar.Header {
		h.Uid, h.Gid, h.Mode = uid, gid, mode
		return h
	}
	at := func(h tar.Header, tm time.Time) tar.Header {
		h.ModTime, h.Format = tm, tar.FormatPAX
		return h
	}
	headers := []tar.Header{
		owned(dirEntry("./"), 7, 8, 0o750),
		pax(fileEntry("ping", "binary"), map[string]string{"security.capability": capNetRaw}),
		pax(fileEntry("many-xattrs", "x"), map[string]string{
			"user.empty": "", "user.a": strings.Repeat("v", 3000), "user." + strings.Repeat("n", 250): "long name",
			"trusted.t": "\x00\xff", "security.selinux": "system_u:object_r:bin_t:s0\x00",
		}),
		pax(owned(fileEntry("acl", "x"), 0, 0, 0o640), map[string]string{aclAccess: acl}),
		pax(dirEntry("acl-dir/"), map[string]string{aclDefault: acl}),
		pax(symlinkEntry("link-xattr", "ping"), map[string]string{"trusted.on-link": "1"}),
		pax(fileEntry("big-xattrs", strings.Repeat("y", 5000)), map[string]string{
			"user.1": strings.Repeat("1", 20000), "user.2": strings.Repeat("2", 20000), "user.3": strings.Repeat("3", 20000),
		}),
		owned(fileEntry("setuid", "s"), 0, 0, 0o4755), owned(fileEntry("setgid", "s"), 0, 5, 0o2755),
		owned(dirEntry("sticky/"), 0, 0, 0o1777), owned(fileEntry("none", "n"), 0, 0, 0),
		owned(fileEntry("nobody", "n"), 65534, 65534, 0o600), owned(fileEntry("big-ids", "n"), 65536, 3_000_000_000, 0o600),
		owned(fileEntry("max-ids", "n"), 1<<32-2, 1<<32-2, 0o600),
		{Typeflag: tar.TypeChar, Name: "null", Mode: 0o666, Devmajor: 1, Devminor: 3},
		{Typeflag: tar.TypeChar, Name: "whiteout-like", Mode: 0, Devmajor: 0, Devminor: 0},
		{Typeflag: tar.TypeBlock, Name: "big-minor", Mode: 0o660, Gid: 6, Devmajor: 259, Devminor: 1_000_000},
		{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o600},
		symlinkEntry("absolute", "/etc/passwd"), symlinkEntry("climbing", "../../../etc/passwd"), symlinkEntry("dangling", "nowhere"),
		symlinkEntry("long-target", strings.Repeat("t/", 2047)+"x"),
		at(fileEntry("ns", "n"), time.Unix(1_700_000_001, 123456789)), at(fileEntry("before-1970", "n"), time.Unix(-5000, 0)),
		at(fileEntry("epoch", "n"), time.Unix(0, 0)), at(fileEntry("far", "n"), time.Unix(1<<34, 5)),
		hardlinkEntry("ping-2", "ping"), hardlinkEntry("./ping-3", "./ping-2"), hardlinkEntry("acl-dir/ping", "ping"),
		hardlinkEntry("null-2", "null"), hardlinkEntry("absolute-2", "absolute"), hardlinkEntry("fifo-2", "fifo"),
		fileEntry("zeta", "last first"), hardlinkEntry("acl-dir/a-first", "zeta"), hardlinkEntry("alpha", "acl-dir/a-first"),
		fileEntry(strings.Repeat("n", 255), "long name"), fileEntry("sp ace\n\t\"\\\x01", "odd"), fileEntry("latin-\xe9", "odd"), fileEntry("日本", "utf-8"),
		fileEntry(".wh", "not a whiteout"), fileEntry("...", "dots"), fileEntry("-dash", "sorts before dot"), fileEntry("+", "plus"),
		fileEntry("empty", ""), fileEntry("block", strings.Repeat("b", 4096)), fileEntry("block+1", strings.Repeat("b", 4097)),
		dirEntry("empty-dir/"), dirEntry("deep/"), dirEntry("many/"),
	}
	for n := 4096 - 200; n < 4096; n += 7 {
		headers = append(headers, fileEntry(fmt.Sprintf("size-%d", n), strings.Repeat("s", n)))
	}
	deep := "deep/"
	for range 60 {
		deep += strings.Repeat("d", 60) + "/"
		headers = append(headers, dirEntry(deep))
	}
	for i := range 3000 {
		headers = append(headers, fileEntry(fmt.Sprintf("many/%05d-%s", i, strings.Repeat("x", i%200)), fmt.Sprint(i)))
	}
	return makeTar(t, headers...)
}

func TestOdditiesAreKept(t *testing.T) {
	data := oddities(t)
	image := importBytes(t, newStore(t), data, "odd")
	compare(t, tarFiles(t, bytes.NewReader(data)), mounted(t, image.Path))
	fsck(t, image.Path)
}

// GNU tar's sparse files, in each of its formats.
func TestSparseFilesAreExpanded(t *testing.T) {
	dir := t.TempDir()
	sparse, err := os.Create(filepath.Join(dir, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer sparse.Close()
	for _, off := range []int64{1 << 20, 3<<20 + 100} {
		if _, err := sparse.WriteAt([]byte("island"), off); err != nil {
			t.Fatal(err)
		}
	}
	if err := sparse.Truncate(8 << 20); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "after"), []byte("after the sparse one"), 0o644); err != nil {
		t.Fatal(err)
	}
	for _, format := range []string{"--format=gnu", "--sparse-version=0.0", "--sparse-version=0.1", "--sparse-version=1.0"} {
		t.Run(format, func(t *testing.T) {
			data, err := exec.CommandContext(t.Context(), "tar", "-C", dir, "--sparse", format, "-cf", "-", ".").Output()
			if err != nil {
				t.Fatal(err)
			}
			if len(data) > 1<<20 {
				t.Fatalf("the tar has %d bytes: it is not sparse", len(data))
			}
			image := importBytes(t, newStore(t), data, "sparse")
			compare(t, tarFiles(t, bytes.NewReader(data)), mounted(t, image.Path))
			fsck(t, image.Path)
		})
	}
}

// The same image must give the same file, byte for byte, on any host at any time.
func TestFileDependsOnImageAlone(t *testing.T) {
	data := oddities(t)
	one, two := importBytes(t, newStore(t), data, "a"), importBytes(t, newStore(t), data, "b")
	sum1, err1 := shaFile(one.Path)
	sum2, err2 := shaFile(two.Path)
	if err := errors.Join(err1, err2); err != nil {
		t.Fatal(err)
	}
	if sum1 != sum2 {
		t.Error("two imports of one archive made different files")
	}
}
