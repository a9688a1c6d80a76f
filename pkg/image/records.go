package image

import (
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	bolt "go.etcd.io/bbolt"
	berrors "go.etcd.io/bbolt/errors"

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
)

// lockWait is how long to wait for another process to let go of the store: a daemon that is just ending.
const lockWait = 5 * time.Second

// records is images.db. Each change is one transaction, on disk when it returns.
type records struct{ db *bolt.DB }

func openRecords(path string) (*records, error) {
	return openRecordsWait(path, lockWait)
}

func openRecordsWait(path string, wait time.Duration) (*records, error) {
	db, err := bolt.Open(path, 0o600, &bolt.Options{Timeout: wait})
	if errors.Is(err, berrors.ErrTimeout) {
		return nil, spec.Errorf(spec.KindWrongState, "%s is in use by another process: stop it, or use another state directory", path)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		_, err1 := tx.CreateBucketIfNotExists(bucketImages)
		_, err2 := tx.CreateBucketIfNotExists(bucketNames)
		return errors.Join(err1, err2)
	})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot prepare %s: %w", path, err), db.Close())
	}
	return &records{db}, nil
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
	return r.db.Update(func(tx *bolt.Tx) error {
		if err := tx.Bucket(bucketImages).Put([]byte(digest), v); err != nil {
			return err
		}
		return putNames(tx, digest, names)
	})
}

// tag gives names to an image that is there; it reports false if it is not.
func (r *records) tag(digest string, names []string) (ok bool, err error) {
	err = r.db.Update(func(tx *bolt.Tx) error {
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
	return r.db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket(bucketNames).Delete([]byte(name))
	})
}

// remove forgets an image and all its names.
func (r *records) remove(digest string) error {
	return r.db.Update(func(tx *bolt.Tx) error {
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
