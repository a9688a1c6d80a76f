package image

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// FuzzImport gives the importer bytes of anybody's making. It must refuse them with an error of a kind and leave nothing,
// or make of them a file that can be read.
func FuzzImport(f *testing.F) {
	layer := makeTar(f, dirEntry("./"), fileEntry("a", "1"), hardlinkEntry("b", "a"), symlinkEntry("s", "d"), fileEntry("s/x", "2"),
		fileEntry(".wh.a", ""), fileEntry("d/.wh..wh..opq", ""), tar.Header{Typeflag: tar.TypeChar, Name: "c", Devmajor: 1, Devminor: 3})
	xattr := fileEntry("x", "y")
	xattr.Format, xattr.PAXRecords = tar.FormatPAX, map[string]string{paxXattr + "user.x": "1", paxXattr + "security.capability": capNetRaw}
	for _, seed := range [][]byte{
		layer, gzipped(f, layer), makeTar(f, xattr), makeTar(f, hardlinkEntry("x", "../x")), {0xfd, '7', 'z', 'X', 'Z', 0}, {0x28, 0xb5, 0x2f, 0xfd},
		dockerArchive(f, testConfig(layer, layer), []string{"x"}, layer, gzipped(f, layer)),
		ociTar(f, func(l *layout) { l.add(l.image(testConfig(layer), types.OCILayer, layer), "x:1", nil) }),
	} {
		f.Add(seed)
	}
	s, err := Open(filepath.Join(f.TempDir(), "images"), nil)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() {
		if err := s.Close(); err != nil {
			f.Error(err)
		}
	})
	s.limits = limits{
		received: mib, content: 16 * mib, expandFloor: mib, expandFactor: 200, entries: 2000, memory: 8 * mib, layers: 8, document: 64 << 10,
	}
	s.records.db.NoSync = true
	f.Fuzz(func(t *testing.T, data []byte) {
		image, err := s.Import(t.Context(), bytes.NewReader(data), "fuzz")
		if err == nil {
			listing(t, image.Path)
			if err := s.Remove(image.Digest, nil); err != nil {
				t.Fatal(err)
			}
		} else if kind := spec.KindOf(err); kind != spec.KindInvalid && kind != spec.KindUnsupported {
			t.Errorf("kind %d: %v", kind, err)
		}
		for _, sub := range []string{erofsDir, tmpDir} {
			if left, err := os.ReadDir(filepath.Join(s.dir, sub)); err != nil || len(left) != 0 {
				t.Fatalf("left behind: %v, %v", left, err)
			}
		}
	})
}
