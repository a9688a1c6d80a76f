package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/zstd"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func simpleLayer(t testing.TB) []byte { return makeTar(t, fileEntry("hello", "world")) }

var simpleListing = []string{"-rw-r--r-- hello = world"}

func TestImportForms(t *testing.T) {
	layer := simpleLayer(t)
	config := testConfig(layer)
	arm := testConfig(layer)
	arm.Architecture = "arm64"
	amd := &v1.Platform{OS: platformOS, Architecture: platformArch}
	for _, tc := range []struct {
		name, as string
		data     []byte
		names    []string
	}{
		{"docker archive", "", dockerArchive(t, config, []string{"debian:12", "example.com/x"}, layer),
			[]string{"docker.io/library/debian:12", "example.com/x:latest"}},
		{"docker archive, named", "mine", dockerArchive(t, config, []string{"debian:12"}, layer), []string{"docker.io/library/mine:latest"}},
		{"docker archive with compressed layers", "", dockerArchiveOf(t, config, gzipped(t, layer)), []string{"docker.io/library/packed:latest"}},
		{"docker archive, itself compressed", "", gzipped(t, dockerArchive(t, config, []string{"z"}, layer)), []string{"docker.io/library/z:latest"}},
		{"OCI layout", "", ociTar(t, func(l *layout) { l.add(l.image(config, types.OCILayer, layer), "quay.io/a/b:1", nil) }), []string{"quay.io/a/b:1"}},
		{"OCI layout, not compressed", "n", ociTar(t, func(l *layout) { l.add(l.image(config, types.OCIUncompressedLayer, layer), "", nil) }),
			[]string{"docker.io/library/n:latest"}},
		{"OCI layout with docker's media types", "n", ociTar(t, func(l *layout) { l.add(l.image(config, types.DockerLayer, layer), "", nil) }),
			[]string{"docker.io/library/n:latest"}},
		{"OCI layout of several platforms", "n", ociTar(t, func(l *layout) {
			l.add(l.image(arm, types.OCILayer, layer), "", &v1.Platform{OS: "linux", Architecture: "arm64"})
			l.add(l.image(config, types.OCILayer, layer), "", amd)
			l.add(l.blob(types.OCIManifestSchema1, []byte("{}")), "", &v1.Platform{OS: "unknown", Architecture: "unknown"})
		}), []string{"docker.io/library/n:latest"}},
		{"OCI layout with an index in its index", "n", ociTar(t, func(l *layout) {
			inner := l.image(config, types.OCILayer, layer)
			inner.Platform = amd
			l.add(l.blob(types.OCIImageIndex, mustJSON(t, v1.IndexManifest{
				SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{inner},
			})), "", nil)
		}), []string{"docker.io/library/n:latest"}},
		{"OCI layout of several images, one named", "x:two", ociTar(t, func(l *layout) {
			l.add(l.image(testConfig(makeTar(t, fileEntry("other", ""))), types.OCILayer, makeTar(t, fileEntry("other", ""))), "one", nil)
			l.add(l.image(config, types.OCILayer, layer), "two", nil)
		}), []string{"docker.io/library/x:two"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			image := importBytes(t, newStore(t), tc.data, tc.as)
			if !slices.Equal(image.Names, tc.names) {
				t.Errorf("names %v, want %v", image.Names, tc.names)
			}
			if got := listing(t, image.Path); !slices.Equal(got[1:], simpleListing) {
				t.Errorf("files %v", got)
			}
			want := spec.ImageConfig{
				Entrypoint: []string{"/init"}, Command: []string{"-v"}, Env: []string{"A=b"}, User: "nobody",
				WorkingDir: "/srv", StopSignal: "SIGINT", Labels: map[string]string{"k": "v"},
			}
			if !bytes.Equal(mustJSON(t, image.Config), mustJSON(t, want)) {
				t.Errorf("configuration %+v", image.Config)
			}
			if image.Platform != "linux/"+platformArch || !image.CreatedAt.Equal(config.Created.Time) {
				t.Errorf("platform %s, created %v", image.Platform, image.CreatedAt)
			}
		})
	}
}

func ociTar(t testing.TB, fill func(*layout)) []byte {
	l := newLayout(t)
	fill(l)
	return l.tar()
}

// dockerArchiveOf puts a layer into an archive as it is given, whatever the configuration says of it.
func dockerArchiveOf(t testing.TB, config v1.ConfigFile, layer []byte) []byte {
	return dockerArchive(t, config, []string{"packed"}, layer)
}

// A layout's digest is its manifest's. A docker archive has none: its digest must not depend on how it was packed.
func TestDigests(t *testing.T) {
	layer := simpleLayer(t)
	l := newLayout(t)
	d := l.image(testConfig(layer), types.OCILayer, layer)
	if image := importBytes(t, newStore(t), l.add(d, "", nil).tar(), "x"); image.Digest != d.Digest.String() {
		t.Errorf("layout: %s, want %s", image.Digest, d.Digest)
	}
	s := newStore(t)
	one := importBytes(t, s, dockerArchive(t, testConfig(layer), []string{"a"}, layer), "")
	two := importBytes(t, s, gzipped(t, dockerArchive(t, testConfig(layer), []string{"b"}, gzipped(t, layer))), "")
	if one.Digest != two.Digest {
		t.Errorf("docker archives: %s and %s", one.Digest, two.Digest)
	}
	if want := []string{"docker.io/library/a:latest", "docker.io/library/b:latest"}; !slices.Equal(two.Names, want) {
		t.Errorf("names %v, want %v", two.Names, want)
	}
}

func TestCompressions(t *testing.T) {
	layer := makeTar(t, fileEntry("hello", "world"), fileEntry("big", strings.Repeat("0123456789abcdef", 1<<16)))
	var zst bytes.Buffer
	w, err := zstd.NewWriter(&zst)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(layer); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	xz := func(args ...string) []byte {
		cmd := exec.CommandContext(t.Context(), "xz", append(args, "-c")...)
		cmd.Stdin = bytes.NewReader(layer)
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("xz: %v", err)
		}
		return out
	}
	half := len(layer) / 2
	for name, data := range map[string][]byte{
		"none": layer, "gzip": gzipped(t, layer), "gzip in two members": append(gzipped(t, layer[:half]), gzipped(t, layer[half:])...),
		"zstd": zst.Bytes(), "xz": xz(), "xz -9": xz("-9"), "xz in blocks": xz("--block-size=65536"), "xz --check=crc32": xz("--check=crc32"),
		"xz --check=sha256": xz("--check=sha256"), "xz --check=none": xz("--check=none"), "xz padded": append(xz(), 0, 0, 0, 0),
		"xz twice": append(xz(), xz()...), // the second tar lies behind the first one's end
	} {
		t.Run(name, func(t *testing.T) {
			image := importBytes(t, newStore(t), data, "x")
			if image.Digest != "sha256:"+sha(data) {
				t.Errorf("digest %s is not the archive's", image.Digest)
			}
			got := listing(t, image.Path)
			if len(got) != 3 || got[2] != simpleListing[0] {
				t.Errorf("%d files", len(got))
			}
			if name == "none" {
				return
			}
			// A bit flipped or an end missing must not go unnoticed.
			for what, bad := range map[string][]byte{"cut": data[:len(data)-20], "flipped": flip(data)} {
				if name == "xz --check=none" && what == "flipped" {
					continue // it has nothing to notice it by
				}
				s := newStore(t)
				_, err := s.Import(t.Context(), bytes.NewReader(bad), "x")
				wantKind(t, err, spec.KindInvalid, "compression is damaged")
				wantEmpty(t, s)
			}
		})
	}
}

func flip(data []byte) []byte {
	bad := bytes.Clone(data)
	bad[len(bad)/2] ^= 0x10
	return bad
}

// A header that asks for a dictionary of 4 GiB must not get one.
func TestXZDictionaryIsBounded(t *testing.T) {
	cmd := exec.CommandContext(t.Context(), "xz", "--lzma2=dict=1536MiB", "-T1", "-c")
	cmd.Stdin = bytes.NewReader(simpleLayer(t))
	data, err := cmd.Output()
	if err != nil {
		t.Fatalf("xz: %v", err)
	}
	s := newStore(t)
	_, err = s.Import(t.Context(), bytes.NewReader(data), "x")
	wantKind(t, err, spec.KindInvalid, "dictionary of 1536 MiB")
	wantEmpty(t, s)
}

func TestMalformedImages(t *testing.T) {
	layer := simpleLayer(t)
	good := testConfig(layer)
	config := func(change func(*v1.ConfigFile)) v1.ConfigFile {
		c := testConfig(layer)
		change(&c)
		return c
	}
	docker := func(c v1.ConfigFile, layers ...[]byte) []byte { return dockerArchive(t, c, []string{"x"}, layers...) }
	header := func(h tar.Header) []byte { return makeTar(t, fileEntry("first", "1"), h) }
	manifest := func(change func(l *layout, m *v1.Manifest)) []byte {
		return ociTar(t, func(l *layout) {
			m := v1.Manifest{SchemaVersion: 2, MediaType: types.OCIManifestSchema1, Config: l.blob(types.OCIConfigJSON, mustJSON(t, good))}
			m.Layers = []v1.Descriptor{l.blob(types.OCIUncompressedLayer, layer)}
			change(l, &m)
			l.add(l.blob(types.OCIManifestSchema1, mustJSON(t, m)), "", nil)
		})
	}
	xattr := fileEntry("x", "")
	xattr.Format, xattr.PAXRecords = tar.FormatPAX, map[string]string{paxXattr + "user.x": strings.Repeat("x", 70_000)}
	for _, tc := range []struct {
		name string
		data []byte
		kind spec.Kind
		want string
	}{
		{"nothing", nil, spec.KindInvalid, "empty"},
		{"no tar", []byte(strings.Repeat("this is no tar at all\n", 100)), spec.KindInvalid, "damaged"},
		{"a tar of nothing", makeTar(t), spec.KindInvalid, "empty"},
		{"a tar cut short", makeTar(t, fileEntry("x", strings.Repeat("x", 5000)))[:4096], spec.KindInvalid, "ends within"},
		{"a tar cut short between files", makeTar(t, fileEntry("x", "x"), fileEntry("y", "y"))[:1024], spec.KindInvalid, "cut short"},
		{"path traversal", header(fileEntry("../evil", "x")), spec.KindInvalid, "leads out"},
		{"path traversal in the middle", header(fileEntry("a/../../evil", "x")), spec.KindInvalid, "leads out"},
		{"path traversal by a directory", header(dirEntry("..")), spec.KindInvalid, "leads out"},
		{"path traversal in a layer", docker(testConfig(header(fileEntry("../x", ""))), header(fileEntry("../x", ""))), spec.KindInvalid, "leads out"},
		{"hard link to the host", header(hardlinkEntry("x", "/etc/shadow")), spec.KindInvalid, "out of the image"},
		{"hard link that climbs", header(hardlinkEntry("x", "../../etc/shadow")), spec.KindInvalid, "leads out"},
		{"hard link to nothing", header(hardlinkEntry("x", "etc/shadow")), spec.KindInvalid, "not in the image"},
		{"hard link to a directory", makeTar(t, dirEntry("d"), hardlinkEntry("x", "d")), spec.KindInvalid, "to a directory"},
		{"hard link to the root", header(hardlinkEntry("x", ".")), spec.KindInvalid, "to a directory"},
		{"hard link through a link that leads out", makeTar(t, symlinkEntry("s", "/etc"), hardlinkEntry("x", "s/shadow")), spec.KindInvalid, "not in the image"},
		{"file below a file", makeTar(t, fileEntry("f", ""), fileEntry("f/x", "")), spec.KindInvalid, "not a directory"},
		{"links in a circle", makeTar(t, symlinkEntry("a", "b"), symlinkEntry("b", "a"), fileEntry("a/x", "")), spec.KindInvalid, "symbolic links"},
		{"root that is no directory", makeTar(t, fileEntry(".", "x")), spec.KindInvalid, "root is not a directory"},
		{"name too long", header(fileEntry(strings.Repeat("n", 256), "")), spec.KindInvalid, "256 bytes"},
		{"path too long", header(fileEntry(strings.Repeat("n/", 2050)+"x", "")), spec.KindInvalid, "4101 bytes"},
		{"too deep by links", deepByLinks(t), spec.KindInvalid, "too deep"},
		{"owner below zero", header(tar.Header{Typeflag: tar.TypeReg, Name: "x", Uid: -1, Format: tar.FormatGNU}), spec.KindInvalid, "belongs to"},
		{"owner too large", header(tar.Header{Typeflag: tar.TypeReg, Name: "x", Gid: 1 << 32, Format: tar.FormatGNU}), spec.KindInvalid, "belongs to"},
		{"device number too large", header(tar.Header{Typeflag: tar.TypeChar, Name: "x", Devmajor: 4096}), spec.KindInvalid, "device 4096:0"},
		{"unknown type of file", header(tar.Header{Typeflag: 'Z', Name: "x"}), spec.KindInvalid, "no Linux file"},
		{"too many extended attributes", header(xattr), spec.KindInvalid, "extended attributes"},
		{"whiteout of nothing", header(fileEntry(".wh.", "")), spec.KindInvalid, "whiteout of nothing"},
		{"whiteout of the parent", header(fileEntry("d/.wh...", "")), spec.KindInvalid, "whiteout of nothing"},

		{"docker: no layers", docker(testConfig()), spec.KindInvalid, "no layers"},
		{"docker: no image", makeTar(t, fileEntry(dockerFile, "[]")), spec.KindInvalid, "lists no image"},
		{"docker: not JSON", makeTar(t, fileEntry(dockerFile, "{")), spec.KindInvalid, "cannot be read"},
		{"docker: no configuration", makeTar(t, fileEntry(dockerFile, `[{"Config":"c","Layers":["l"]}]`)), spec.KindInvalid, "no file"},
		{"docker: several images", makeTar(t, fileEntry(dockerFile, `[{"RepoTags":["a"]},{"RepoTags":["b"]}]`)), spec.KindInvalid, "2 images"},
		{"docker: configuration tampered with", bytes.Replace(docker(good, layer), []byte("nobody"), []byte("nobod0"), 1), spec.KindInvalid, "tampered"},
		{"docker: layer tampered with", bytes.Replace(docker(good, layer), []byte("world"), []byte("w0rld"), 1), spec.KindInvalid, "tampered"},
		{"docker: more layers than it should have", docker(good, layer, layer), spec.KindInvalid, "2 layers, its configuration 1"},
		{"docker: layer outside", makeTar(t, fileEntry("c", string(mustJSON(t, good))), symlinkEntry("l", "/etc/shadow"),
			fileEntry(dockerFile, `[{"Config":"c","Layers":["l"]}]`)), spec.KindInvalid, "no file"},
		{"docker: layer in a circle", makeTar(t, fileEntry("c", string(mustJSON(t, good))), symlinkEntry("l", "l"),
			fileEntry(dockerFile, `[{"Config":"c","Layers":["l"]}]`)), spec.KindInvalid, "loop"},
		{"docker: another platform", docker(config(func(c *v1.ConfigFile) { c.Architecture = "s390x" }), layer), spec.KindUnsupported, "linux/s390x"},
		{"docker: Windows", docker(config(func(c *v1.ConfigFile) { c.OS = "windows" }), layer), spec.KindUnsupported, "windows"},
		{"docker: NUL in the environment", docker(config(func(c *v1.ConfigFile) { c.Config.Env = []string{"A=\x00"} }), layer), spec.KindInvalid, "NUL"},

		{"docker: huge labels", docker(config(func(c *v1.ConfigFile) { c.Config.Labels = map[string]string{"x": strings.Repeat("x", 600<<10)} }), layer),
			spec.KindInvalid, "512 KiB"},

		{"OCI: no layers", manifest(func(_ *layout, m *v1.Manifest) { m.Layers = nil }), spec.KindInvalid, "no layers"},
		{"OCI: unknown media type of a layer", manifest(func(_ *layout, m *v1.Manifest) { m.Layers[0].MediaType = "application/x-evil" }), spec.KindInvalid, "application/x-evil"},
		{"OCI: foreign layer", manifest(func(_ *layout, m *v1.Manifest) { m.Layers[0].MediaType = types.DockerForeignLayer }), spec.KindInvalid, "not distributed"},
		{"OCI: unknown media type of the configuration", manifest(func(_ *layout, m *v1.Manifest) { m.Config.MediaType = types.OCIEmptyJSON }), spec.KindInvalid, "vnd.oci.empty"},
		{"OCI: layer missing", manifest(func(l *layout, m *v1.Manifest) { delete(l.blobs, "blobs/sha256/"+m.Layers[0].Digest.Hex) }), spec.KindInvalid, "no file"},
		{"OCI: layer tampered with", manifest(func(l *layout, m *v1.Manifest) {
			l.blobs["blobs/sha256/"+m.Layers[0].Digest.Hex] = bytes.Replace(layer, []byte("world"), []byte("w0rld"), 1)
		}), spec.KindInvalid, "tampered"},
		{"OCI: layer of another size", manifest(func(_ *layout, m *v1.Manifest) { m.Layers[0].Size++ }), spec.KindInvalid, "instead of"},
		{"OCI: layer of negative size", manifest(func(_ *layout, m *v1.Manifest) { m.Layers[0].Size = -1 }), spec.KindInvalid, "-1 bytes"},
		{"OCI: another hash", manifest(func(_ *layout, m *v1.Manifest) {
			m.Layers[0].Digest = v1.Hash{Algorithm: "sha512", Hex: strings.Repeat("a", 128)}
		}), spec.KindInvalid, "sha256"},
		{"OCI: configuration tampered with", manifest(func(l *layout, m *v1.Manifest) {
			at := "blobs/sha256/" + m.Config.Digest.Hex
			l.blobs[at] = bytes.Replace(l.blobs[at], []byte("nobody"), []byte("nobod0"), 1)
		}), spec.KindInvalid, "tampered"},
		{"OCI: configuration of another image", manifest(func(l *layout, m *v1.Manifest) {
			m.Config = l.blob(types.OCIConfigJSON, mustJSON(t, testConfig(makeTar(t))))
		}), spec.KindInvalid, "tampered"},
		{"OCI: manifest that says it is an index", manifest(func(_ *layout, m *v1.Manifest) { m.MediaType = types.OCIImageIndex }), spec.KindInvalid, "is referred to as"},
		{"OCI: manifest missing", ociTar(t, func(l *layout) {
			l.add(v1.Descriptor{MediaType: types.OCIManifestSchema1, Size: 9, Digest: hashOf([]byte("none"))}, "", nil)
		}), spec.KindInvalid, "no file"},
		{"OCI: nothing in the index", ociTar(t, func(*layout) {}), spec.KindInvalid, "lists no image"},
		{"OCI: index in a circle is too deep", nestedIndexes(t), spec.KindInvalid, "nested more than"},
		{"OCI: only other platforms", ociTar(t, func(l *layout) {
			l.add(l.image(good, types.OCILayer, layer), "", &v1.Platform{OS: "linux", Architecture: "riscv64"})
		}), spec.KindUnsupported, "riscv64"},
		{"OCI: several images", ociTar(t, func(l *layout) {
			l.add(l.image(good, types.OCILayer, layer), "one", nil)
			l.add(l.image(good, types.OCIUncompressedLayer, layer), "two", nil)
		}), spec.KindInvalid, "several images"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := newStore(t)
			_, err := s.Import(t.Context(), bytes.NewReader(tc.data), "x")
			wantKind(t, err, tc.kind, tc.want)
			if err != nil && !strings.HasPrefix(err.Error(), `cannot import the image "x": `) {
				t.Errorf("%q does not say what failed", err)
			}
			wantEmpty(t, s)
		})
	}
}

func nestedIndexes(t testing.TB) []byte {
	return ociTar(t, func(l *layout) {
		d := l.image(testConfig(simpleLayer(t)), types.OCILayer, simpleLayer(t))
		for range maxIndexDepth {
			d = l.blob(types.OCIImageIndex, mustJSON(t, v1.IndexManifest{SchemaVersion: 2, MediaType: types.OCIImageIndex, Manifests: []v1.Descriptor{d}}))
		}
		l.add(d, "", nil)
	})
}

// deepByLinks has paths that are short by themselves but lead through links to ever deeper directories.
func deepByLinks(t testing.TB) []byte {
	deep := strings.Repeat("d/", 1000)
	return makeTar(t, dirEntry(deep), symlinkEntry("l1", deep), dirEntry("l1/"+deep), symlinkEntry("l2", deep+deep), dirEntry("l2/"+deep))
}

func TestNamesAreBounded(t *testing.T) {
	tags := make([]string, maxNames+1)
	for i := range tags {
		tags[i] = fmt.Sprintf("x:%d", i)
	}
	s := newStore(t)
	_, err := s.Import(t.Context(), bytes.NewReader(dockerArchive(t, testConfig(simpleLayer(t)), tags, simpleLayer(t))), "")
	wantKind(t, err, spec.KindInvalid, "129 names")
	wantEmpty(t, s)
}

func TestNamesAreRequiredAndChecked(t *testing.T) {
	s := newStore(t)
	for _, data := range [][]byte{simpleLayer(t), dockerArchive(t, testConfig(simpleLayer(t)), nil, simpleLayer(t))} {
		_, err := s.Import(t.Context(), bytes.NewReader(data), "")
		wantKind(t, err, spec.KindInvalid, "give it a name")
	}
	for _, bad := range []string{"-x", "../x", "a b", "sha256:abc", "sha256:" + strings.Repeat("0", 64), "x@y", strings.Repeat("x", 600), "x\n"} {
		_, err := s.Import(t.Context(), bytes.NewReader(simpleLayer(t)), bad)
		wantKind(t, err, spec.KindInvalid, "")
	}
	wantEmpty(t, s)
}

// A root file system may have a file called manifest.json.
func TestRootFileSystemWithManifest(t *testing.T) {
	image := importBytes(t, newStore(t), makeTar(t, fileEntry(dockerFile, "[]"), dirEntry("usr/")), "x")
	if got := listing(t, image.Path); len(got) != 3 {
		t.Errorf("files %v", got)
	}
}

// blockingReader gives data and then nothing until its context ends.
type blockingReader struct {
	data    io.Reader
	ctx     context.Context
	reached func()
}

func (b *blockingReader) Read(p []byte) (int, error) {
	n, err := b.data.Read(p)
	if n > 0 {
		return n, nil
	}
	b.reached()
	<-b.ctx.Done()
	return 0, errors.Join(err, b.ctx.Err())
}

func TestCancelLeavesNothing(t *testing.T) {
	s := newStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := s.Import(ctx, &blockingReader{bytes.NewReader(simpleLayer(t)), ctx, cancel}, "x")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	wantEmpty(t, s)
}

// A writer that is told to stop in the middle must stop.
func TestCancelWhileBuilding(t *testing.T) {
	s := newStore(t)
	ctx, cancel := context.WithCancel(t.Context())
	im := s.newImporter(ctx, func(p Progress) {
		if p.Phase == PhaseBuild {
			cancel()
		}
	})
	defer im.release()
	_, err := im.importArchive(bytes.NewReader(makeTar(t, fileEntry("a", strings.Repeat("a", 3<<20)), fileEntry("b", strings.Repeat("b", 3<<20)))), "docker.io/library/x:latest")
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	wantEmpty(t, s)
}

func TestCloseEndsImports(t *testing.T) {
	s, err := Open(t.TempDir()+"/images", nil)
	if err != nil {
		t.Fatal(err)
	}
	started := make(chan struct{})
	result := make(chan error, 1)
	release, stop := context.WithCancel(t.Context())
	go func() {
		_, err := s.Import(context.Background(), &blockingReader{bytes.NewReader(simpleLayer(t)), release, sync.OnceFunc(func() { close(started) })}, "x")
		result <- err
	}()
	<-started
	closed := make(chan error, 1)
	go func() { closed <- s.Close() }()
	<-s.ctx.Done()
	stop()
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if err := <-result; err == nil {
		t.Error("the import ended well in a closed store")
	}
	if _, err := s.Import(t.Context(), bytes.NewReader(nil), "x"); spec.KindOf(err) != spec.KindUnavailable {
		t.Errorf("import after close: %v", err)
	}
}

// Many imports of one image at once make one file, and each gives its name.
func TestConcurrentImports(t *testing.T) {
	s := newStore(t)
	layer := makeTar(t, fileEntry("data", strings.Repeat("x", 1<<20)))
	data := dockerArchive(t, testConfig(layer), []string{"x"}, layer)
	names := []string{"a", "b", "c", "d", "e", "f"}
	var wg sync.WaitGroup
	for _, n := range names {
		wg.Go(func() {
			if _, err := s.Import(t.Context(), bytes.NewReader(data), n); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	images, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	if len(images) != 1 || len(images[0].Names) != len(names) {
		t.Errorf("images %+v", images)
	}
	if len(s.digests.held) != 0 {
		t.Errorf("locks still held: %v", s.digests.held)
	}
}

// The first import of an image fails while a second waits for it: the second must do the work itself.
func TestSecondImportOutlivesFirst(t *testing.T) {
	s := newStore(t)
	layer := simpleLayer(t)
	unlock, err := s.digests.lock(t.Context(), "sha256:"+sha(layer))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := s.Import(t.Context(), bytes.NewReader(layer), "x")
		done <- err
	}()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := s.Import(ctx, bytes.NewReader(layer), "y"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a waiting import does not end with its context: %v", err)
	}
	unlock()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
