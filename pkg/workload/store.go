package workload

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// record is what is kept of a workload across restarts.
type record struct {
	Workload
	// Starts so far. Each run has a process of its own in the agent, named by runProcess.
	Run int `json:"run"`
	// Output bytes in the log when the current run began: the agent counts from there.
	LogBase uint64 `json:"logBase,omitempty"`
	// Who created it.
	Caller spec.Caller `json:"caller"`
	// The configuration the agent was given, to be stored with the record but apart from it: it is large, and written once a
	// run.
	config []byte
}

// store keeps the records in one bbolt file. Every put is on the disk when it returns.
type store struct{ db *bbolt.DB }

var (
	bucketWorkloads = []byte("workloads")
	bucketConfigs   = []byte("configs") // of the last run that came to RUNNING, by id
	bucketMeta      = []byte("meta")
	keyVersion      = []byte("version")
)

const (
	storeVersion = "1"
	// storeLockWait bounds the wait for another daemon that has the file open.
	storeLockWait = 2 * time.Second
)

func openStore(path string) (*store, error) {
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{Timeout: storeLockWait, NoFreelistSync: true})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return nil, spec.Errorf(spec.KindUnavailable, "cannot open %s: another sandboxd has it open; stop it or use another --state-dir", path)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open %s: %w", path, err)
	}
	s := &store{db}
	err = db.Update(func(tx *bbolt.Tx) error {
		meta, err := tx.CreateBucketIfNotExists(bucketMeta)
		if err != nil {
			return err
		}
		if v := meta.Get(keyVersion); v != nil && string(v) != storeVersion {
			return fmt.Errorf("its version is %q and this sandboxd knows %q: use the sandboxd that wrote it", v, storeVersion)
		}
		if err := meta.Put(keyVersion, []byte(storeVersion)); err != nil {
			return err
		}
		for _, name := range [][]byte{bucketWorkloads, bucketConfigs} {
			if _, err := tx.CreateBucketIfNotExists(name); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		db.Close()
		return nil, fmt.Errorf("cannot use %s: %w", path, err)
	}
	return s, nil
}

func (s *store) put(r *record) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("cannot encode record: %w", err)
	}
	if err := s.db.Update(func(tx *bbolt.Tx) error {
		if r.config != nil {
			if err := tx.Bucket(bucketConfigs).Put([]byte(r.ID), r.config); err != nil {
				return err
			}
		}
		return tx.Bucket(bucketWorkloads).Put([]byte(r.ID), b)
	}); err != nil {
		return fmt.Errorf("cannot store record: %w", err)
	}
	return nil
}

func (s *store) delete(id string) error {
	if err := s.db.Update(func(tx *bbolt.Tx) error {
		if err := tx.Bucket(bucketConfigs).Delete([]byte(id)); err != nil {
			return err
		}
		return tx.Bucket(bucketWorkloads).Delete([]byte(id))
	}); err != nil {
		return fmt.Errorf("cannot delete record: %w", err)
	}
	return nil
}

// config is what put was last given for a workload, nil if nothing.
func (s *store) config(id string) (config []byte, err error) {
	err = s.db.View(func(tx *bbolt.Tx) error {
		config = bytes.Clone(tx.Bucket(bucketConfigs).Get([]byte(id)))
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("cannot read the configuration of workload %s: %w", id, err)
	}
	return config, nil
}

func (s *store) all() ([]*record, error) {
	var out []*record
	err := s.db.View(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketWorkloads).ForEach(func(k, v []byte) error {
			r := new(record)
			if err := json.Unmarshal(v, r); err != nil {
				return fmt.Errorf("cannot read record %s: %w", k, err)
			}
			out = append(out, r)
			return nil
		})
	})
	return out, err
}

func (s *store) close() error { return s.db.Close() }
