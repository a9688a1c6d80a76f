package image

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func TestCanonicalNames(t *testing.T) {
	for in, want := range map[string]string{
		"debian":                       "docker.io/library/debian:latest",
		"debian:12":                    "docker.io/library/debian:12",
		"docker.io/debian":             "docker.io/library/debian:latest",
		"docker.io/library/debian":     "docker.io/library/debian:latest",
		"index.docker.io/library/x:1":  "docker.io/library/x:1",
		"user/app":                     "docker.io/user/app:latest",
		"localhost:5000/x:y":           "localhost:5000/x:y",
		"localhost:5000/x":             "localhost:5000/x:latest",
		"quay.io/a/b/c:1":              "quay.io/a/b/c:1",
		"My-Image":                     "My-Image",
		"x@sha256:" + sha([]byte("x")): "docker.io/library/x@sha256:" + sha([]byte("x")),
	} {
		got, err := canonicalName(in)
		if err != nil || got != want {
			t.Errorf("%s: %s, %v; want %s", in, got, err, want)
		}
		again, err := canonicalName(want)
		if err != nil || again != want {
			t.Errorf("%s is not canonical: %s, %v", want, again, err)
		}
	}
}

func TestGet(t *testing.T) {
	s := newStore(t)
	one := importBytes(t, s, simpleLayer(t), "debian")
	two := importBytes(t, s, makeTar(t, fileEntry("other", "")), "localhost:5000/x:y")
	digits := strings.TrimPrefix(one.Digest, digestPrefix)
	for _, ref := range []string{"debian", "debian:latest", "docker.io/library/debian", one.Digest, digits, digits[:6], "sha256:" + digits[:10], "debian@" + one.Digest} {
		if got, err := s.Get(ref); err != nil || got.Digest != one.Digest {
			t.Errorf("%s: %v, %v", ref, got.Digest, err)
		}
	}
	if got, err := s.Get("localhost:5000/x:y"); err != nil || got.Digest != two.Digest {
		t.Errorf("%v, %v", got, err)
	}
	for _, ref := range []string{"", "debian:12", "x", digits[:5], "sha256:" + strings.Repeat("0", 64), "other@" + one.Digest, "DEBIAN", "../debian"} {
		_, err := s.Get(ref)
		wantKind(t, err, spec.KindNotFound, "import or pull it first")
	}
}

func TestDigitsMustNotBeAmbiguous(t *testing.T) {
	s := newStore(t)
	for _, d := range []string{"abcdef0", "abcdef1"} {
		digest := digestPrefix + d + strings.Repeat("0", 64-len(d))
		if err := s.records.put(digest, record{}, nil); err != nil {
			t.Fatal(err)
		}
	}
	_, err := s.Get("abcdef")
	wantKind(t, err, spec.KindInvalid, "2 images")
	if _, err := s.Get("abcdef1"); err != nil {
		t.Error(err)
	}
}

// A name goes with the last image that got it; the other stays, without it.
func TestRetag(t *testing.T) {
	s := newStore(t)
	one := importBytes(t, s, simpleLayer(t), "a")
	importBytes(t, s, simpleLayer(t), "b")
	two := importBytes(t, s, makeTar(t, fileEntry("other", "")), "a")
	if got, err := s.Get("a"); err != nil || got.Digest != two.Digest {
		t.Errorf("a is %v, %v", got.Digest, err)
	}
	got, err := s.Get(one.Digest)
	if err != nil || !slices.Equal(got.Names, []string{"docker.io/library/b:latest"}) {
		t.Errorf("names %v, %v", got.Names, err)
	}
	importBytes(t, s, makeTar(t, fileEntry("other", "")), "b")
	if got, err = s.Get(one.Digest); err != nil || len(got.Names) != 0 {
		t.Errorf("names %v, %v", got.Names, err)
	}
	images, err := s.List()
	if err != nil || len(images) != 2 || images[1].Digest != one.Digest {
		t.Errorf("list %+v, %v", images, err)
	}
}

func TestRemove(t *testing.T) {
	s := newStore(t)
	image := importBytes(t, s, simpleLayer(t), "a")
	importBytes(t, s, simpleLayer(t), "b")
	used := func(digest string) bool { return digest == image.Digest }
	// A name among others may go while the image is used.
	if err := s.Remove("a", used); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get("a"); spec.KindOf(err) != spec.KindNotFound {
		t.Errorf("a is still there: %v", err)
	}
	for _, ref := range []string{"b", image.Digest} {
		wantKind(t, s.Remove(ref, used), spec.KindWrongState, "a workload or a snapshot uses it")
	}
	if _, err := os.Stat(image.Path); err != nil {
		t.Fatal(err)
	}
	if err := s.Remove("b", func(string) bool { return false }); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, s)
	wantKind(t, s.Remove("b", nil), spec.KindNotFound, "no image")

	image = importBytes(t, s, simpleLayer(t), "a")
	importBytes(t, s, simpleLayer(t), "b")
	if err := s.Remove(image.Digest, nil); err != nil {
		t.Fatal(err)
	}
	wantEmpty(t, s)
}

// What a kill can leave behind is gone after the next Open, and what was finished is still there.
func TestOpenCleans(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "images")
	s, err := Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	image := importBytes(t, s, simpleLayer(t), "kept")
	lost := importBytes(t, s, makeTar(t, fileEntry("other", "")), "lost")
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	// Killed while writing; killed between rename and record; killed between record and unlink; a stranger's file.
	unrecorded := filepath.Join(dir, erofsDir, fileName(digestPrefix+strings.Repeat("1", 64)))
	for _, path := range []string{filepath.Join(dir, tmpDir, "erofs-123"), filepath.Join(dir, tmpDir, "spool-1"), unrecorded, filepath.Join(dir, erofsDir, "x")} {
		if err := os.WriteFile(path, []byte("half"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(lost.Path); err != nil {
		t.Fatal(err)
	}
	s = openStore(t, dir)
	images, err := s.List()
	if err != nil || len(images) != 1 || images[0].Digest != image.Digest {
		t.Errorf("images %+v, %v", images, err)
	}
	if _, err := s.Get("lost"); spec.KindOf(err) != spec.KindNotFound {
		t.Errorf("an image without a file is there: %v", err)
	}
	for sub, want := range map[string][]string{tmpDir: nil, erofsDir: {filepath.Base(image.Path)}} {
		entries, err := os.ReadDir(filepath.Join(dir, sub))
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for _, e := range entries {
			names = append(names, e.Name())
		}
		if !slices.Equal(names, want) {
			t.Errorf("%s holds %v, want %v", sub, names, want)
		}
	}
	if got := importBytes(t, s, simpleLayer(t), "again"); !slices.Equal(got.Config.Entrypoint, image.Config.Entrypoint) || len(got.Names) != 2 {
		t.Errorf("image %+v", got)
	}
}

func TestOneProcessAtATime(t *testing.T) {
	s := newStore(t)
	_, err := openRecordsWait(s.dir, 1, zap.NewNop())
	wantKind(t, err, spec.KindWrongState, "in use by another process")
}

func TestOpenRefusesLinks(t *testing.T) {
	for _, sub := range []string{"", erofsDir, tmpDir} {
		base := t.TempDir()
		elsewhere := filepath.Join(base, "elsewhere")
		dir := filepath.Join(base, "images")
		if err := os.Mkdir(elsewhere, 0o755); err != nil {
			t.Fatal(err)
		}
		if sub != "" {
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink(elsewhere, filepath.Join(dir, sub)); err != nil {
			t.Fatal(err)
		}
		if s, err := Open(dir, nil); err == nil {
			s.Close()
			t.Errorf("opened through a symbolic link at %q", sub)
		}
		if left, err := os.ReadDir(elsewhere); err != nil || len(left) != 0 {
			t.Errorf("wrote through a symbolic link: %v, %v", left, err)
		}
	}
}

// Directories are the daemon's alone: an image's files may be secret, and setuid.
func TestStoreIsPrivate(t *testing.T) {
	s := newStore(t)
	for _, sub := range []string{"", erofsDir, tmpDir} {
		info, err := os.Stat(filepath.Join(s.dir, sub))
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != 0o700 {
			t.Errorf("%q has mode %v", sub, info.Mode())
		}
	}
}

// A removed image stays readable to who has it open, as a running sandbox does.
func TestRemovedImageStaysReadable(t *testing.T) {
	s := newStore(t)
	image := importBytes(t, s, simpleLayer(t), "a")
	f, err := os.Open(image.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := s.Remove("a", nil); err != nil {
		t.Fatal(err)
	}
	head := make([]byte, superEnd)
	if _, err := f.ReadAt(head, 0); err != nil || bytes.Equal(head, make([]byte, superEnd)) {
		t.Errorf("%v", err)
	}
}
