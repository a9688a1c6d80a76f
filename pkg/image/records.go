package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"
	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// record is what images.db keeps of an image, as JSON by digest.
type record struct {
	SizeBytes int64            `json:"sizeBytes"`
	CreatedAt time.Time        `json:"createdAt"`
	Platform  string           `json:"platform"`
	Config    spec.ImageConfig `json:"config"`
}

var (
	bucketImages = []byte("images") // digest → record
	bucketNames  = []byte("names")  // canonical name → digest
	bucketCheck  = []byte("check")  // checkVersion, checkSum
)

// lockWait is how long to wait for another process to let go of the store: a daemon that is just ending.
const lockWait = 5 * time.Second

// records is images.db, and the files in known/. Each change is one transaction, on disk when it returns.
type records struct {
	db *bolt.DB
	// Where what is known of each image is kept, and what is.
	dir  string
	kept map[string][]byte
}

func openRecords(dir string, log *zap.Logger) (*records, error) {
	return openRecordsWait(dir, lockWait, log)
}

// openRecordsWait opens the images.db in dir, and makes it anew when it is damaged.
func openRecordsWait(dir string, wait time.Duration, log *zap.Logger) (*records, error) {
	path := filepath.Join(dir, recordsFile)
	lost, err := mendRecords(dir, wait, log)
	if err != nil {
		return nil, err
	}
	r, err := openBolt(path, filepath.Join(dir, knownDir), wait)
	if err != nil {
		return nil, err
	}
	if r.kept, err = rawKnown(r.dir); err == nil {
		err = r.update(func(tx *bolt.Tx) error {
			_, err1 := tx.CreateBucketIfNotExists(bucketImages)
			_, err2 := tx.CreateBucketIfNotExists(bucketNames)
			return errors.Join(err1, err2)
		})
	}
	if err == nil && !lost {
		err = removeOthers(r.dir, r.kept)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot prepare %s: %w", path, err), r.close())
	}
	return r, nil
}

func openBolt(path, known string, wait time.Duration) (*records, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: wait})
	if errors.Is(err, berrors.ErrTimeout) {
		return nil, errInUse(path)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	return &records{db: db, dir: known}, nil
}

func errInUse(path string) error {
	return spec.Errorf(spec.KindWrongState, "%s is in use by another process: stop it, or use another state directory", path)
}

// update is one change. What it makes of the images is in their files, and summed, before it is there.
func (r *records) update(change func(tx *bolt.Tx) error) error {
	return r.db.Update(func(tx *bolt.Tx) error {
		if err := change(tx); err != nil {
			return err
		}
		all, err := contentOf(bucketsOf(tx))
		if err != nil {
			return err
		}
		if r.kept, err = keepKnown(r.dir, r.kept, all, uint64(tx.ID())); err != nil {
			r.kept = nil // nobody knows what they say: the next change writes all
			return err
		}
		return putSum(tx)
	})
}

func (r *records) close() error { return r.db.Close() }

func (r *records) all() (map[string]record, error) {
	all := map[string]record{}
	err := r.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketImages).ForEach(func(k, v []byte) error {
			var one record
			if err := json.Unmarshal(v, &one); err != nil {
				return fmt.Errorf("cannot read the record of %s: %w", k, err)
			}
			all[string(k)] = one
			return nil
		})
	})
	return all, err
}

func (r *records) get(digest string) (record, error) {
	var one record
	err := r.db.View(func(tx *bolt.Tx) error {
		v := tx.Bucket(bucketImages).Get([]byte(digest))
		if v == nil {
			return spec.Errorf(spec.KindNotFound, "no image %s", digest)
		}
		return json.Unmarshal(v, &one)
	})
	return one, err
}

// lookup gives the digest a canonical name stands for, empty if none.
func (r *records) lookup(name string) (digest string, err error) {
	err = r.db.View(func(tx *bolt.Tx) error {
		digest = string(tx.Bucket(bucketNames).Get([]byte(name)))
		return nil
	})
	return digest, err
}

// withPrefix gives the digests that begin so.
func (r *records) withPrefix(prefix string) (digests []string, err error) {
	err = r.db.View(func(tx *bolt.Tx) error {
		c := tx.Bucket(bucketImages).Cursor()
		for k, _ := c.Seek([]byte(prefix)); k != nil && strings.HasPrefix(string(k), prefix); k, _ = c.Next() {
			digests = append(digests, string(k))
		}
		return nil
	})
	return digests, err
}

// names gives the names of an image, sorted.
func (r *records) names(digest string) (names []string, err error) {
	err = r.db.View(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketNames).ForEach(func(k, v []byte) error {
			if string(v) == digest {
				names = append(names, string(k))
			}
			return nil
		})
	})
	return names, err
}

// put records an image and gives it names, taking them from whatever image had them.
func (r *records) put(digest string, one record, names []string) error {
	v, err := json.Marshal(one)
	if err != nil {
		return err
	}
	return r.update(func(tx *bolt.Tx) error {
		if err := tx.Bucket(bucketImages).Put([]byte(digest), v); err != nil {
			return err
		}
		return putNames(tx, digest, names)
	})
}

// tag gives names to an image that is there; it reports false if it is not.
func (r *records) tag(digest string, names []string) (ok bool, err error) {
	err = r.update(func(tx *bolt.Tx) error {
		if ok = tx.Bucket(bucketImages).Get([]byte(digest)) != nil; !ok {
			return nil
		}
		return putNames(tx, digest, names)
	})
	return ok, err
}

func putNames(tx *bolt.Tx, digest string, names []string) error {
	for _, n := range names {
		if err := tx.Bucket(bucketNames).Put([]byte(n), []byte(digest)); err != nil {
			return err
		}
	}
	return nil
}

func (r *records) untag(name string) error {
	return r.update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketNames).Delete([]byte(name))
	})
}

// remove forgets an image and all its names.
func (r *records) remove(digest string) error {
	return r.update(func(tx *bolt.Tx) error {
		var names [][]byte
		err := tx.Bucket(bucketNames).ForEach(func(k, v []byte) error {
			if string(v) == digest {
				names = append(names, append([]byte(nil), k...))
			}
			return nil
		})
		if err != nil {
			return err
		}
		for _, n := range names {
			if err := tx.Bucket(bucketNames).Delete(n); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketImages).Delete([]byte(digest))
	})
}
