package image

import (
	"os"
	"testing"
)

// BenchmarkImport imports the Debian root, to a disk and durably: what image import takes beyond sending the archive.
func BenchmarkImport(b *testing.B) {
	path := debianTar(b)
	info, err := os.Stat(path)
	if err != nil {
		b.Fatal(err)
	}
	b.SetBytes(info.Size())
	s := newStore(b)
	for b.Loop() {
		f, err := os.Open(path)
		if err != nil {
			b.Fatal(err)
		}
		image, err := s.Import(b.Context(), f, "debian")
		f.Close()
		if err != nil {
			b.Fatal(err)
		}
		if err := s.Remove(image.Digest, nil); err != nil {
			b.Fatal(err)
		}
	}
}
