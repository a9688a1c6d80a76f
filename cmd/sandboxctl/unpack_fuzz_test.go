package main

import (
	"archive/tar"
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzUnpackCopy: whatever a sandbox sends as a copy of something of its own, nothing comes to be beside the place for it, and
// nothing that is there is changed or made special.
func FuzzUnpackCopy(f *testing.F) {
	add := func(headers ...tar.Header) {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range headers {
			h.Size = 0
			_ = w.WriteHeader(&h)
		}
		_ = w.Close()
		f.Add(b.Bytes())
	}
	top := tar.Header{Name: "src/", Typeflag: tar.TypeDir, Mode: 0o755}
	add(top, tar.Header{Name: "src/f", Typeflag: tar.TypeReg, Mode: 0o6755})
	add(top, tar.Header{Name: "src/../../outside/kept", Typeflag: tar.TypeReg})
	add(top, tar.Header{Name: "/etc/passwd", Typeflag: tar.TypeReg})
	add(top, tar.Header{Name: "src/l", Typeflag: tar.TypeSymlink, Linkname: "../../outside"}, tar.Header{Name: "src/l/new", Typeflag: tar.TypeReg})
	add(top, tar.Header{Name: "src/h", Typeflag: tar.TypeLink, Linkname: "../outside/kept"})
	add(top, tar.Header{Name: "src/h", Typeflag: tar.TypeLink, Linkname: "src/../../outside/kept"}, tar.Header{Name: "src/h", Typeflag: tar.TypeReg, Mode: 0o777})
	add(top, tar.Header{Name: "src/d", Typeflag: tar.TypeBlock, Mode: 0o666}, tar.Header{Name: "src/p", Typeflag: tar.TypeFifo})
	add(tar.Header{Name: "src", Typeflag: tar.TypeSymlink, Linkname: "../outside"}, tar.Header{Name: "src/new", Typeflag: tar.TypeReg})
	f.Add([]byte("no tar"))
	f.Fuzz(func(t *testing.T, b []byte) {
		base := t.TempDir()
		outside := filepath.Join(base, "outside")
		if err := os.MkdirAll(outside, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(outside, "kept"), []byte("kept"), 0o600); err != nil {
			t.Fatal(err)
		}
		place := filepath.Join(base, "place")
		if err := os.Mkdir(place, 0o700); err != nil {
			t.Fatal(err)
		}
		tr := tar.NewReader(bytes.NewReader(b))
		first, err := tr.Next()
		if err != nil {
			return
		}
		u := &unpacker{warn: func(string) {}}
		_ = u.unpack(t.Context(), tr, first, target{place, "copy"})
		err = filepath.WalkDir(base, func(path string, e fs.DirEntry, err error) error {
			if err != nil {
				return nil // a directory whose mode says that not even its owner may look
			}
			rel, _ := filepath.Rel(base, path)
			switch {
			case rel == "." || rel == "outside" || rel == "outside/kept" || rel == "place" || rel == "place/copy" || strings.HasPrefix(rel, "place/copy/"):
			default:
				t.Errorf("%s came to be", rel)
			}
			if info, err := e.Info(); err == nil && info.Mode()&(fs.ModeSetuid|fs.ModeSetgid|fs.ModeDevice|fs.ModeNamedPipe|fs.ModeSocket) != 0 {
				t.Errorf("%s has mode %v", rel, info.Mode())
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(filepath.Join(outside, "kept")); err != nil || string(got) != "kept" {
			t.Errorf("what was outside: %q, %v", got, err)
		}
		if info, err := os.Stat(filepath.Join(outside, "kept")); err != nil || info.Mode() != 0o600 {
			t.Errorf("what was outside has mode %v, %v", info.Mode(), err)
		}
	})
}
