package workload

import (
	"go.etcd.io/bbolt"
)

func setStoreVersion(path, version string) error {
	db, err := bbolt.Open(path, 0o600, nil)
	if err != nil {
		return err
	}
	defer db.Close()
	return db.Update(func(tx *bbolt.Tx) error {
		return tx.Bucket(bucketMeta).Put(keyVersion, []byte(version))
	})
}
