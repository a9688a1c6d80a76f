package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	bolt "go.etcd.io/bbolt"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

// A store with two images, three names, and its directory; it is closed.
func twoImages(t *testing.T) (dir string, images []Image) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "images")
	s, err := Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	importBytes(t, s, simpleLayer(t), "one")
	importBytes(t, s, makeTar(t, fileEntry("other", "")), "one") // its name goes to the second
	importBytes(t, s, simpleLayer(t), "first")
	importBytes(t, s, simpleLayer(t), "gone")
	if err := s.Remove("gone", nil); err != nil {
		t.Fatal(err)
	}
	if images, err = s.List(); err != nil || len(images) != 2 {
		t.Fatalf("%+v, %v", images, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	return dir, images
}

func wantImages(t *testing.T, what, dir string, want []Image) {
	t.Helper()
	for range 2 { // the second time it is whole
		s, err := Open(dir, nil)
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
		got, err := s.List()
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Fatalf("%s: images %+v, %v, want %+v", what, got, err, want)
		}
		for _, i := range want {
			if _, err := os.Stat(i.Path); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
		}
	}
}

// Whatever becomes of images.db, no image is lost, no name is another's, and what was there stays to be looked at.
func TestDamagedRecordsAreMadeAnew(t *testing.T) {
	dir, images := twoImages(t)
	path := filepath.Join(dir, recordsFile)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	damages := map[string][]byte{
		"zero length": {}, "a byte": whole[:1], "half a page": whole[:2048], "one page": whole[:4096], "two pages": whole[:8192],
		"half":          whole[:len(whole)/2],
		"one head lost": slices.Concat(make([]byte, 4096), whole[4096:]), "other head lost": slices.Concat(whole[:4096], make([]byte, 4096), whole[8192:]),
		"zeros": make([]byte, len(whole)), "foreign": bytes.Repeat([]byte("SQLite format 3\x00"), 1<<10),
		"text": []byte("{}"),
	}
	for what, damaged := range damages {
		if err := os.WriteFile(path, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		wantImages(t, what, dir, images)
		copies, err := damagedRecords(dir)
		if err != nil || len(copies) != 1 {
			t.Fatalf("%s: copies %q, %v", what, copies, err)
		}
		if kept, err := os.ReadFile(copies[0]); err != nil || !bytes.Equal(kept, damaged) {
			t.Fatalf("%s: the copy is not what was there: %v", what, err)
		}
		if err := os.Remove(copies[0]); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	wantImages(t, "gone", dir, images)
}

// Each bit that counts: what is read of a file with another one is refused, or the same.
func TestNoFlippedBitIsBelieved(t *testing.T) {
	dir, _ := twoImages(t)
	whole, err := os.ReadFile(filepath.Join(dir, recordsFile))
	if err != nil {
		t.Fatal(err)
	}
	c, err := readBolt(whole)
	if err == nil {
		err = checkContent(c)
	}
	if err != nil {
		t.Fatal(err)
	}
	want := sumOf(c.buckets)
	found := 0
	for at := range whole {
		for _, bit := range []byte{1, 0x10, 0x80} {
			b := bytes.Clone(whole)
			b[at] ^= bit
			c, err := readBolt(b)
			if err == nil {
				err = checkContent(c)
			}
			if err != nil {
				found++
			} else if sumOf(c.buckets) != want {
				t.Fatalf("bit %#x of byte %d flipped: something else is believed", bit, at)
			}
		}
	}
	if found < 1000 {
		t.Errorf("of %d bytes only %d bits were found", len(whole), found)
	}
}

// The daemon starts with any bit flipped, and has all images.
func TestFlippedBitsAreMended(t *testing.T) {
	dir, images := twoImages(t)
	path := filepath.Join(dir, recordsFile)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(whole); at += 499 {
		b := bytes.Clone(whole)
		b[at] ^= 0x10
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		wantImages(t, fmt.Sprintf("byte %d", at), dir, images)
	}
}

// What is not ours to mend is refused, and stays as it is.
func TestForeignRecordsAreRefused(t *testing.T) {
	newer := func(b []byte) []byte {
		b = bytes.Clone(b)
		for _, at := range []int{0, os.Getpagesize()} {
			m := b[at+boltPageHeader:]
			binary.LittleEndian.PutUint32(m[4:], 3)
			h := fnv.New64a()
			_, _ = h.Write(m[:boltMetaSum])
			binary.LittleEndian.PutUint64(m[boltMetaSum:], h.Sum64())
		}
		return b
	}
	for what, c := range map[string]struct {
		put  func(t *testing.T, path string, whole []byte) error
		want string
	}{
		"another version of bbolt": {func(_ *testing.T, path string, whole []byte) error { return os.WriteFile(path, newer(whole), 0o600) }, "use the sandboxd that wrote it"},
		"another version of ours":  {putVersion, "use the sandboxd that wrote it"},
		"a directory":              {func(_ *testing.T, path string, _ []byte) error { return os.Mkdir(path, 0o700) }, "is a directory"},
		"a link":                   {func(_ *testing.T, path string, _ []byte) error { return os.Symlink("/dev/null", path) }, "too many levels of symbolic links"},
		"a fifo":                   {func(_ *testing.T, path string, _ []byte) error { return unix.Mkfifo(path, 0o600) }, "not a regular file"},
	} {
		t.Run(what, func(t *testing.T) {
			dir, images := twoImages(t)
			path := filepath.Join(dir, recordsFile)
			whole, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if what != "another version of ours" {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			}
			if err := c.put(t, path, whole); err != nil {
				t.Fatal(err)
			}
			before := content(path)
			if s, err := Open(dir, nil); err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
				if err == nil {
					s.Close()
				}
				t.Fatalf("opened with %v, want %q", err, c.want)
			}
			if after := content(path); !bytes.Equal(before, after) {
				t.Error("it was changed")
			}
			for _, i := range images {
				if _, err := os.Stat(i.Path); err != nil {
					t.Error(err)
				}
			}
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, whole, 0o600); err != nil {
				t.Fatal(err)
			}
			wantImages(t, "put back", dir, images)
		})
	}
}

// A file whose image nothing is known of is kept while the copy is there, and goes afterwards.
func TestUnknownFilesStayBesideDamage(t *testing.T) {
	dir, images := twoImages(t)
	path := filepath.Join(dir, recordsFile)
	lost := images[0]
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, knownDir, knownName(lost.Digest)), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		wantImages(t, "one unknown", dir, images[1:])
		if _, err := os.Stat(lost.Path); err != nil {
			t.Fatal(err)
		}
	}
	copies, err := damagedRecords(dir)
	if err != nil || len(copies) != 1 {
		t.Fatalf("%q, %v", copies, err)
	}
	if err := os.Remove(copies[0]); err != nil {
		t.Fatal(err)
	}
	wantImages(t, "the copy removed", dir, images[1:])
	if left, err := filepath.Glob(filepath.Join(dir, "*", "*"+strings.TrimPrefix(lost.Digest, digestPrefix)+"*")); err != nil || len(left) > 0 {
		t.Errorf("left %q, %v", left, err)
	}
}

// A database of an earlier sandboxd has no sum, and nothing was kept beside it: it is used, and kept from then on.
func TestRecordsOfAnEarlierDaemon(t *testing.T) {
	dir, images := twoImages(t)
	path := filepath.Join(dir, recordsFile)
	unsummed(t, path)
	if err := os.RemoveAll(filepath.Join(dir, knownDir)); err != nil {
		t.Fatal(err)
	}
	wantImages(t, "earlier", dir, images)
	if err := os.Truncate(path, 5000); err != nil {
		t.Fatal(err)
	}
	wantImages(t, "damaged later", dir, images)
}

func FuzzReadBolt(f *testing.F) {
	path := filepath.Join(f.TempDir(), recordsFile)
	if err := writeRecords(path, map[string]known{"d": {Digest: "d", Names: []string{"n"}}}); err != nil {
		f.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(whole)
	f.Fuzz(func(_ *testing.T, b []byte) {
		if c, err := readBolt(b); err == nil {
			_ = checkContent(c)
		}
	})
}

func changeBolt(path string, change func(tx *bolt.Tx) error) error {
	db, err := bolt.Open(path, 0o600, nil)
	if err != nil {
		return err
	}
	return errors.Join(db.Update(change), db.Close())
}

func putVersion(_ *testing.T, path string, _ []byte) error {
	return changeBolt(path, func(tx *bolt.Tx) error {
		return tx.Bucket(bucketCheck).Put(checkVersion, []byte{recordsVersion + 1})
	})
}

func unsummed(t *testing.T, path string) {
	t.Helper()
	if err := changeBolt(path, func(tx *bolt.Tx) error { return tx.DeleteBucket(bucketCheck) }); err != nil {
		t.Fatal(err)
	}
}

// content is a regular file's, nil of what is none: to open a FIFO waits.
func content(path string) []byte {
	b, err := wholefile.ReadOwn(path, maxRecordsFile)
	if err != nil {
		return nil
	}
	return b
}
