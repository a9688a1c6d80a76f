package image

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"time"

	bolt "go.etcd.io/bbolt"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

const (
	recordsFile = "images.db"
	// damagedSuffix and a number follow its name in that of the copy of a damaged one, newSuffix in that of one being made.
	damagedSuffix = ".damaged-"
	newSuffix     = ".new"
	// maxRecordsFile bounds what is read of it: it has a few kilobytes an image.
	maxRecordsFile = gib
	// recordsVersion is that of what the buckets hold. One that is not said is 1.
	recordsVersion = 1
)

var (
	checkVersion = []byte("version")
	// The number of the change that it was written with, and the CRC-32C of both buckets after it, little endian. A change
	// without one is an earlier sandboxd's.
	checkSum = []byte("sum")
)

// damagedRecords are the copies of damaged databases.
func damagedRecords(dir string) ([]string, error) {
	return filepath.Glob(filepath.Join(dir, recordsFile) + damagedSuffix + "*")
}

func sumOf(buckets map[string]map[string][]byte) uint32 {
	h := crc32.New(castagnoli)
	write := func(b []byte) {
		_, _ = h.Write(binary.LittleEndian.AppendUint64(nil, uint64(len(b)))) // a hash never fails
		_, _ = h.Write(b)
	}
	for _, name := range [][]byte{bucketImages, bucketNames} {
		in := buckets[string(name)]
		write(name)
		for _, k := range slices.Sorted(maps.Keys(in)) {
			write([]byte(k))
			write(in[k])
		}
	}
	return h.Sum32()
}

func bucketsOf(tx *bolt.Tx) map[string]map[string][]byte {
	buckets := map[string]map[string][]byte{}
	for _, name := range [][]byte{bucketImages, bucketNames} {
		in := map[string][]byte{}
		buckets[string(name)] = in
		if b := tx.Bucket(name); b != nil {
			for k, v := range cursorOf(b) {
				in[string(k)] = v
			}
		}
	}
	return buckets
}

func cursorOf(b *bolt.Bucket) func(yield func(k, v []byte) bool) {
	return func(yield func(k, v []byte) bool) {
		c := b.Cursor()
		for k, v := c.First(); k != nil && yield(k, v); k, v = c.Next() {
		}
	}
}

func putSum(tx *bolt.Tx) error {
	b, err := tx.CreateBucketIfNotExists(bucketCheck)
	if err != nil {
		return err
	}
	if err := b.Put(checkVersion, []byte{recordsVersion}); err != nil {
		return err
	}
	said := binary.LittleEndian.AppendUint64(nil, uint64(tx.ID()))
	return b.Put(checkSum, binary.LittleEndian.AppendUint32(said, sumOf(bucketsOf(tx))))
}

// checkContent says if what a database holds is what was put into it.
func checkContent(c *boltContent) error {
	check := c.buckets[string(bucketCheck)]
	if v, ok := check[string(checkVersion)]; ok && (len(v) != 1 || v[0] > recordsVersion) {
		return fmt.Errorf("%w: %v, and this sandboxd knows %d", errBoltVersion, v, recordsVersion)
	}
	if s := check[string(checkSum)]; len(s) == 12 && binary.LittleEndian.Uint64(s) == c.change && binary.LittleEndian.Uint32(s[8:]) != sumOf(c.buckets) {
		return boltErrorf("its content has another sum")
	}
	_, err := contentOf(c.buckets)
	return err
}

// contentOf are the images that the buckets tell of.
func contentOf(buckets map[string]map[string][]byte) (map[string]known, error) {
	all := map[string]known{}
	for digest, v := range buckets[string(bucketImages)] {
		k := known{Digest: digest}
		if err := json.Unmarshal(v, &k.Record); err != nil {
			return nil, boltErrorf("the record of %q: %w", digest, err)
		}
		all[digest] = k
	}
	names := buckets[string(bucketNames)]
	for _, n := range slices.Sorted(maps.Keys(names)) {
		k, ok := all[string(names[n])]
		if !ok {
			return nil, boltErrorf("the name %q is of no image", n)
		}
		k.Names = append(k.Names, n)
		all[k.Digest] = k
	}
	return all, nil
}

// mendRecords makes images.db anew if it is damaged, or gone while its images are there, from what is known of each image. What
// there was stays as a copy. lost: there are images that nothing is known of.
func mendRecords(dir string, wait time.Duration, log *zap.Logger) (lost bool, err error) {
	path := filepath.Join(dir, recordsFile)
	lock, err := lockRecords(path, wait)
	if errors.Is(err, fs.ErrNotExist) {
		return remake(dir, nil, log, errors.New("it is gone"))
	}
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	b, err := wholefile.ReadFrom(lock, maxRecordsFile)
	if err != nil {
		return false, fmt.Errorf("cannot read %s: %w", path, err)
	}
	c, err := readBolt(b)
	if err == nil {
		err = checkContent(c)
	}
	switch {
	case err == nil:
		copies, err := damagedRecords(dir)
		return len(copies) > 0, err
	case errors.Is(err, errBoltVersion):
		return false, fmt.Errorf("cannot use %s: %w: use the sandboxd that wrote it", path, err)
	}
	return remake(dir, b, log, err)
}

// lockRecords opens the database and has it alone, as bbolt does.
func lockRecords(path string, wait time.Duration) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	for end := time.Now().Add(wait); ; time.Sleep(lockPoll) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return nil, errors.Join(fmt.Errorf("cannot lock %s: %w", path, err), f.Close())
		}
		if time.Now().After(end) {
			return nil, errors.Join(errInUse(path), f.Close())
		}
	}
}

// lockPoll paces the wait for another daemon that is just ending.
const lockPoll = 20 * time.Millisecond

// remake makes images.db anew; damaged is what it was, nil for none.
func remake(dir string, damaged []byte, log *zap.Logger, why error) (lost bool, err error) {
	files, err := os.ReadDir(filepath.Join(dir, erofsDir))
	if err != nil {
		return false, err
	}
	if len(files) == 0 && len(damaged) == 0 {
		return false, nil // a new one
	}
	path := filepath.Join(dir, recordsFile)
	all, err := readKnown(filepath.Join(dir, knownDir))
	if err != nil {
		return false, fmt.Errorf("cannot make %s anew: %w", path, err)
	}
	there := map[string]known{}
	for _, f := range files {
		digest, err := digestOfFile(f.Name())
		if k, ok := all[digest]; ok && err == nil {
			there[digest] = k
		} else {
			lost = true
		}
	}
	// Also of one that is gone: its files without a record may be of images that somebody needs.
	kept := fmt.Sprintf("%s%s%d", path, damagedSuffix, time.Now().UnixNano())
	if err := wholefile.ReplaceDurably(kept, damaged); err != nil {
		return false, fmt.Errorf("cannot keep a copy of %s, which cannot be used (%w): make room, and start sandboxd again: %w", path, why, err)
	}
	if err := writeRecords(path, there); err != nil {
		return false, fmt.Errorf("cannot make %s anew, of which %s is a copy: %w", path, kept, err)
	}
	log.Warn("made the records of images anew from what was kept of each", zap.NamedError("why", why), zap.Int("images", len(there)),
		zap.Int("files", len(files)), zap.String("copy", kept))
	return lost, nil
}

// writeRecords puts a new database in the place of what is at path, in one step.
func writeRecords(path string, all map[string]known) error {
	if err := os.RemoveAll(path + newSuffix); err != nil {
		return err
	}
	db, err := bolt.Open(path+newSuffix, 0o600, &bolt.Options{Timeout: lockWait})
	if err != nil {
		return err
	}
	err = db.Update(func(tx *bolt.Tx) error {
		images, err1 := tx.CreateBucketIfNotExists(bucketImages)
		names, err2 := tx.CreateBucketIfNotExists(bucketNames)
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		for digest, k := range all {
			v, err := json.Marshal(k.Record)
			if err == nil {
				err = images.Put([]byte(digest), v)
			}
			for _, n := range k.Names {
				err = errors.Join(err, names.Put([]byte(n), []byte(digest)))
			}
			if err != nil {
				return err
			}
		}
		return putSum(tx)
	})
	if err = errors.Join(err, db.Close()); err != nil {
		return errors.Join(err, os.Remove(path+newSuffix))
	}
	if err := os.Rename(path+newSuffix, path); err != nil {
		return err
	}
	return wholefile.SyncDir(filepath.Dir(path))
}
