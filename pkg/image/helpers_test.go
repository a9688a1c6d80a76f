package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/erofs/go-erofs"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"go.uber.org/zap/zaptest"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func openStore(t testing.TB, dir string) *Store {
	t.Helper()
	s, err := Open(dir, zaptest.NewLogger(t))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func newStore(t testing.TB) *Store {
	t.Helper()
	return openStore(t, filepath.Join(t.TempDir(), "images"))
}

// wantEmpty checks that a failed import left nothing: no file, no record, no name.
func wantEmpty(t testing.TB, s *Store) {
	t.Helper()
	for _, sub := range []string{erofsDir, tmpDir} {
		left, err := os.ReadDir(filepath.Join(s.dir, sub))
		if err != nil {
			t.Fatal(err)
		}
		for _, e := range left {
			t.Errorf("%s/%s was left behind", sub, e.Name())
		}
	}
	images, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range images {
		t.Errorf("the image %s %v was left behind", i.Digest, i.Names)
	}
}

func wantKind(t testing.TB, err error, kind spec.Kind, text string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want kind %d and %q", kind, text)
	}
	if got := spec.KindOf(err); got != kind {
		t.Errorf("kind %d, want %d: %v", got, kind, err)
	}
	if !strings.Contains(err.Error(), text) {
		t.Errorf("error %q, want it to say %q", err, text)
	}
}

// Headers for tests, by what they are.

func dirEntry(name string) tar.Header {
	return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755}
}

// fileEntry's content is its user name, which nothing else uses.
func fileEntry(name, content string) tar.Header {
	return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Uname: content, Size: int64(len(content))}
}

func symlinkEntry(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777}
}

func hardlinkEntry(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target, Mode: 0o644}
}

// makeTar writes a tar of headers; a regular file's content is in Uname.
func makeTar(t testing.TB, headers ...tar.Header) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range headers {
		content := h.Uname
		h.Uname = ""
		if h.ModTime.IsZero() {
			h.ModTime = time.Unix(1_600_000_000, 0)
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg {
			if _, err := io.WriteString(w, content); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func gzipped(t testing.TB, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	w := gzip.NewWriter(&buf)
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func sha(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func hashOf(data []byte) v1.Hash {
	return v1.Hash{Algorithm: "sha256", Hex: sha(data)}
}

func mustJSON(t testing.TB, v any) []byte {
	t.Helper()
	raw, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return raw
}

// testConfig is the configuration of an image of layers, given as tars.
func testConfig(layers ...[]byte) v1.ConfigFile {
	c := v1.ConfigFile{
		OS: platformOS, Architecture: platformArch,
		Created: v1.Time{Time: time.Date(2024, 2, 3, 4, 5, 6, 0, time.UTC)},
		Config: v1.Config{
			Entrypoint: []string{"/init"}, Cmd: []string{"-v"}, Env: []string{"A=b"}, User: "nobody",
			WorkingDir: "/srv", StopSignal: "SIGINT", Labels: map[string]string{"k": "v"},
		},
		RootFS: v1.RootFS{Type: "layers"},
	}
	for _, l := range layers {
		c.RootFS.DiffIDs = append(c.RootFS.DiffIDs, hashOf(l))
	}
	return c
}

// dockerArchive is what docker save wrote before version 25.
func dockerArchive(t testing.TB, config v1.ConfigFile, tags []string, layers ...[]byte) []byte {
	t.Helper()
	rawConfig := mustJSON(t, config)
	image := dockerImage{Config: sha(rawConfig) + ".json", RepoTags: tags, Layers: []string{}}
	files := []tar.Header{fileEntry(image.Config, string(rawConfig))}
	for i, l := range layers {
		name := fmt.Sprintf("layer%d/layer.tar", i)
		image.Layers = append(image.Layers, name)
		files = append(files, dirEntry(fmt.Sprintf("layer%d/", i)), fileEntry(name, string(l)))
	}
	files = append(files, fileEntry(dockerFile, string(mustJSON(t, []dockerImage{image}))))
	return makeTar(t, files...)
}

// layout is an OCI layout under construction: its blobs, and the manifests of its index.
type layout struct {
	t         testing.TB
	blobs     map[string][]byte
	manifests []v1.Descriptor
}

func newLayout(t testing.TB) *layout { return &layout{t: t, blobs: map[string][]byte{}} }

func (l *layout) blob(mediaType types.MediaType, data []byte) v1.Descriptor {
	l.blobs["blobs/sha256/"+sha(data)] = data
	return v1.Descriptor{MediaType: mediaType, Size: int64(len(data)), Digest: hashOf(data)}
}

// image adds an image of layers, compressed as mediaType says.
func (l *layout) image(config v1.ConfigFile, mediaType types.MediaType, layers ...[]byte) v1.Descriptor {
	m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Layers: []v1.Descriptor{}}
	m.Config = l.blob(types.OCIConfigJSON, mustJSON(l.t, config))
	for _, data := range layers {
		if mediaType == types.OCILayer || mediaType == types.DockerLayer {
			data = gzipped(l.t, data)
		}
		m.Layers = append(m.Layers, l.blob(mediaType, data))
	}
	return l.blob(types.OCIManifestSchema1, mustJSON(l.t, m))
}

func (l *layout) add(d v1.Descriptor, refName string, p *v1.Platform) *layout {
	if refName != "" {
		d.Annotations = map[string]string{"org.opencontainers.image.ref.name": refName}
	}
	d.Platform = p
	l.manifests = append(l.manifests, d)
	return l
}

func (l *layout) tar() []byte {
	index := v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: l.manifests}
	headers := []tar.Header{
		fileEntry(ociLayoutFile, `{"imageLayoutVersion":"1.0.0"}`),
		fileEntry(ociIndexFile, string(mustJSON(l.t, index))),
	}
	names := make([]string, 0, len(l.blobs))
	for name := range l.blobs {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		headers = append(headers, fileEntry(name, string(l.blobs[name])))
	}
	return makeTar(l.t, headers...)
}

// listing shows an EROFS file as go-erofs reads it, a line per name: type and permissions, path, content or target.
func listing(t testing.TB, file string) []string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	img, err := erofs.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	err = fs.WalkDir(img, ".", func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		line := info.Mode().String() + " " + path
		switch {
		case info.Mode().IsRegular():
			data, err := fs.ReadFile(img, path)
			if err != nil {
				return err
			}
			line += " = " + string(data)
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := fs.ReadLink(img, path)
			if err != nil {
				return err
			}
			line += " -> " + target
		}
		lines = append(lines, line)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// fsck checks an EROFS file with the file system's own tool.
func fsck(t testing.TB, file string) {
	t.Helper()
	tool, err := exec.LookPath("fsck.erofs")
	if err != nil {
		t.Fatal("fsck.erofs is missing: apt-get install erofs-utils")
	}
	out, err := exec.CommandContext(t.Context(), tool, "--extract", file).CombinedOutput()
	if err != nil {
		t.Errorf("fsck.erofs finds fault with %s: %v\n%s", filepath.Base(file), err, out)
	}
}

func importBytes(t testing.TB, s *Store, data []byte, name string) Image {
	t.Helper()
	image, err := s.Import(t.Context(), bytes.NewReader(data), name)
	if err != nil {
		t.Fatal(err)
	}
	return image
}
