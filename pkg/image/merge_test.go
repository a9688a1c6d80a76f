package image

import (
	"archive/tar"
	"slices"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Each case lays layers over one another and says what the root looks like then, but for the root itself.
func TestMerge(t *testing.T) {
	type layer = []tar.Header
	for _, tc := range []struct {
		name   string
		layers []layer
		want   []string
	}{
		{"a whiteout removes a file of a lower layer", []layer{
			{fileEntry("a", "1"), fileEntry("b", "1")},
			{fileEntry(".wh.a", "")},
		}, []string{"-rw-r--r-- b = 1"}},
		{"a whiteout removes a directory with all below", []layer{
			{dirEntry("d/"), dirEntry("d/e/"), fileEntry("d/e/f", "1"), fileEntry("x", "1")},
			{fileEntry(".wh.d", "")},
		}, []string{"-rw-r--r-- x = 1"}},
		{"a whiteout leaves its own layer alone, wherever it stands", []layer{
			{fileEntry("a", "1"), fileEntry("b", "1")},
			{fileEntry("a", "2"), fileEntry(".wh.a", ""), fileEntry(".wh.b", ""), fileEntry("b", "2")},
		}, []string{"-rw-r--r-- a = 2", "-rw-r--r-- b = 2"}},
		{"a whiteout of a directory made anew hides what was in it", []layer{
			{dirEntry("d/"), fileEntry("d/old", "1"), dirEntry("d/sub/"), fileEntry("d/sub/old", "1")},
			{dirEntry("d/"), fileEntry("d/new", "2"), fileEntry("d/sub/new", "2"), fileEntry(".wh.d", "")},
		}, []string{"drwxr-xr-x d", "-rw-r--r-- d/new = 2", "drwxr-xr-x d/sub", "-rw-r--r-- d/sub/new = 2"}},
		{"a whiteout of nothing does nothing", []layer{
			{fileEntry("a", "1")},
			{fileEntry(".wh.b", ""), fileEntry("no/such/.wh.dir", ""), fileEntry("a/.wh.b", "")},
		}, []string{"-rw-r--r-- a = 1"}},
		{"an opaque directory hides what lower layers put there, not what this one does", []layer{
			{dirEntry("d/"), fileEntry("d/old", "1"), dirEntry("d/sub/"), fileEntry("d/sub/old", "1")},
			{dirEntry("d/"), fileEntry("d/new", "2"), fileEntry("d/.wh..wh..opq", "")},
			{fileEntry("d/third", "3")},
		}, []string{"drwxr-xr-x d", "-rw-r--r-- d/new = 2", "-rw-r--r-- d/third = 3"}},
		{"the root may be opaque", []layer{
			{fileEntry("a", "1"), dirEntry("d/")},
			{fileEntry(".wh..wh..opq", ""), fileEntry("b", "2")},
		}, []string{"-rw-r--r-- b = 2"}},
		{"aufs's bookkeeping is left out", []layer{
			{dirEntry(".wh..wh.plnk/"), fileEntry(".wh..wh.aufs", ""), fileEntry("a", "1")},
		}, []string{"-rw-r--r-- a = 1"}},
		{"a file takes the place of a directory, with all below", []layer{
			{dirEntry("x/"), fileEntry("x/y", "1")},
			{fileEntry("x", "2")},
		}, []string{"-rw-r--r-- x = 2"}},
		{"a directory takes the place of a file", []layer{
			{fileEntry("x", "1")},
			{dirEntry("x/"), fileEntry("x/y", "2")},
		}, []string{"drwxr-xr-x x", "-rw-r--r-- x/y = 2"}},
		{"a directory takes the place of a symbolic link, whose target stays", []layer{
			{dirEntry("t/"), fileEntry("t/keep", "1"), symlinkEntry("x", "t")},
			{dirEntry("x/"), fileEntry("x/.wh..wh..opq", ""), fileEntry("x/y", "2")},
		}, []string{"drwxr-xr-x t", "-rw-r--r-- t/keep = 1", "drwxr-xr-x x", "-rw-r--r-- x/y = 2"}},
		{"a symbolic link takes the place of a directory", []layer{
			{dirEntry("x/"), fileEntry("x/y", "1")},
			{symlinkEntry("x", "/nowhere")},
		}, []string{"Lrwxrwxrwx x -> /nowhere"}},
		{"a directory's new mode counts, its files stay", []layer{
			{dirEntry("d/"), fileEntry("d/f", "1")},
			{{Typeflag: tar.TypeDir, Name: "d", Mode: 0o700}},
		}, []string{"drwx------ d", "-rw-r--r-- d/f = 1"}},
		{"directories without an entry are made", []layer{
			{fileEntry("a/b/c", "1")},
		}, []string{"drwxr-xr-x a", "drwxr-xr-x a/b", "-rw-r--r-- a/b/c = 1"}},
		{"entries below a symbolic link to a directory go where it leads inside the image", []layer{
			{dirEntry("usr/"), dirEntry("usr/bin/"), symlinkEntry("bin", "usr/bin"), symlinkEntry("abs", "/usr/bin"), symlinkEntry("up", "../../usr")},
			{fileEntry("bin/a", "2"), fileEntry("abs/b", "2"), fileEntry("up/bin/c", "2"), fileEntry("bin/.wh.none", "")},
		}, []string{
			"Lrwxrwxrwx abs -> /usr/bin", "Lrwxrwxrwx bin -> usr/bin", "Lrwxrwxrwx up -> ../../usr", "drwxr-xr-x usr", "drwxr-xr-x usr/bin",
			"-rw-r--r-- usr/bin/a = 2", "-rw-r--r-- usr/bin/b = 2", "-rw-r--r-- usr/bin/c = 2",
		}},
		{"a dangling symbolic link leads to a directory made inside the image", []layer{
			{symlinkEntry("out", "/../../etc/evil"), fileEntry("out/passwd", "1")},
		}, []string{"drwxr-xr-x etc", "drwxr-xr-x etc/evil", "-rw-r--r-- etc/evil/passwd = 1", "Lrwxrwxrwx out -> /../../etc/evil"}},
		{"a whiteout works through a symbolic link", []layer{
			{dirEntry("usr/"), fileEntry("usr/a", "1"), symlinkEntry("s", "usr")},
			{fileEntry("s/.wh.a", "")},
		}, []string{"Lrwxrwxrwx s -> usr", "drwxr-xr-x usr"}},
		{"a hard link keeps the content when the other name is replaced or removed", []layer{
			{fileEntry("a", "1"), hardlinkEntry("b", "a"), hardlinkEntry("c", "a")},
			{fileEntry("a", "2"), fileEntry(".wh.c", "")},
		}, []string{"-rw-r--r-- a = 2", "-rw-r--r-- b = 1"}},
		{"a hard link reaches a file of a lower layer", []layer{
			{dirEntry("d/"), fileEntry("d/a", "1"), symlinkEntry("s", "d")},
			{hardlinkEntry("b", "s/a"), fileEntry("d/.wh.a", "")},
		}, []string{"-rw-r--r-- b = 1", "drwxr-xr-x d", "Lrwxrwxrwx s -> d"}},
		{"a hard link to a symbolic link is to the link", []layer{
			{symlinkEntry("s", "/etc/shadow"), hardlinkEntry("h", "s")},
		}, []string{"Lrwxrwxrwx h -> /etc/shadow", "Lrwxrwxrwx s -> /etc/shadow"}},
		{"a hard link to itself is no change", []layer{
			{fileEntry("a", "1"), hardlinkEntry("a", "a")},
		}, []string{"-rw-r--r-- a = 1"}},
		{"the last of two entries counts", []layer{
			{fileEntry("a", "1"), fileEntry("a", "2"), fileEntry("./a", "3")},
		}, []string{"-rw-r--r-- a = 3"}},
		{"names from the root on are inside", []layer{
			{fileEntry("/etc/x", "1"), fileEntry("//etc//./y", "1")},
		}, []string{"drwxr-xr-x etc", "-rw-r--r-- etc/x = 1", "-rw-r--r-- etc/y = 1"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var layers [][]byte
			for _, l := range tc.layers {
				layers = append(layers, makeTar(t, l...))
			}
			image := importBytes(t, newStore(t), dockerArchive(t, testConfig(layers...), []string{"m"}, layers...), "")
			got := listing(t, image.Path)
			if !slices.Equal(got[1:], tc.want) {
				t.Errorf("got\n %s\nwant\n %s", strings.Join(got[1:], "\n "), strings.Join(tc.want, "\n "))
			}
			fsck(t, image.Path)
		})
	}
}

// Overlayfs must take no orders from an image, and EROFS has no room for names outside Linux's namespaces.
func TestXattrsThatAreNotKept(t *testing.T) {
	h := fileEntry("f", "x")
	h.Format = tar.FormatPAX
	h.PAXRecords = map[string]string{
		paxXattr + "trusted.overlay.redirect": "/etc", paxXattr + "user.overlay.opaque": "y", paxXattr + "com.example": "1",
		paxXattr + "system.posix_acl_accessible": "1", paxXattr + "user.": "no name", paxXattr + "user.kept": "1", "LIBARCHIVE.xattr.user.b": "MQ",
	}
	image := importBytes(t, newStore(t), makeTar(t, h), "x")
	got := mounted(t, image.Path)["f"].Xattrs
	if len(got) != 1 || got["user.kept"] != "31" {
		t.Errorf("got %v, want user.kept alone", got)
	}
}

func TestLimits(t *testing.T) {
	plain := func(h ...tar.Header) []byte { return makeTar(t, h...) }
	many := make([]tar.Header, 200)
	for i := range many {
		many[i] = fileEntry(strings.Repeat("n", i+1), strings.Repeat("c", 100))
	}
	zeros := makeTar(t, fileEntry("zeros", strings.Repeat("\x00", 4<<20)))
	for _, tc := range []struct {
		name   string
		limits func(*limits)
		data   []byte
		want   string
	}{
		{"received", func(l *limits) { l.received = 1000 }, plain(many...), "larger than"},
		{"content", func(l *limits) { l.content = 10_000 }, gzipped(t, zeros), "after decompression"},
		{"gzip bomb", func(l *limits) { l.expandFloor = 1 << 20 }, gzipped(t, zeros), "expands to more than 200 times"},
		{"entries", func(l *limits) { l.entries = 199 }, plain(many...), "more than 199 files"},
		{"memory", func(l *limits) { l.memory = 200 << 10 }, plain(many...), "of memory"},
		{"implied directories count", func(l *limits) { l.entries = 50 }, plain(fileEntry(strings.Repeat("d/", 100)+"f", "")), "more than 50 files"},
		{"layers", func(l *limits) { l.layers = 1 }, dockerArchive(t, testConfig(zeros, zeros), []string{"x"}, zeros, zeros), "more than 1"},
		{"document", func(l *limits) { l.document = 500 }, dockerArchive(t, testConfig(zeros), []string{strings.Repeat("x", 600)}, zeros), "more than 500 bytes"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newStore(t)
			tc.limits(&s.limits)
			_, err := s.Import(t.Context(), strings.NewReader(string(tc.data)), "x")
			wantKind(t, err, spec.KindInvalid, tc.want)
			wantEmpty(t, s)
		})
	}
}
