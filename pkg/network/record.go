package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

const (
	recordFile    = "record.json"
	recordVersion = 1
	// maxRecord bounds what is read of a record: a conflist and a result.
	maxRecord = maxConfBytes*2 + 1<<20
)

// record is what must be known to undo an ADD, written before it.
type record struct {
	Version int    `json:"version"`
	Network string `json:"network"`
	// The conflist that ADD got.
	Conflist   json.RawMessage `json:"conflist"`
	PluginDirs []string        `json:"pluginDirs"`
	// Set once ADD is done.
	Joined *spec.Network `json:"joined,omitempty"`
	// Set once DEL is about to run.
	Leaving bool `json:"leaving,omitempty"`
}

// writeRecord replaces a record in one step, and answers when it is on the disk: leases outlive the host's boot.
func writeRecord(dir string, r record) error {
	r.Version = recordVersion
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("cannot encode a network record: %w", err)
	}
	if err := wholefile.ReplaceDurably(filepath.Join(dir, recordFile), b); err != nil {
		return fmt.Errorf("cannot write a network record: %w", err)
	}
	return nil
}

// readRecord answers fs.ErrNotExist if there is none.
func readRecord(dir string) (record, error) {
	b, err := wholefile.ReadOwn(filepath.Join(dir, recordFile), maxRecord)
	if err != nil {
		return record{}, fmt.Errorf("cannot read a network record: %w", err)
	}
	return parseRecord(b)
}

func parseRecord(b []byte) (record, error) {
	var r record
	if err := json.Unmarshal(b, &r); err != nil {
		return record{}, fmt.Errorf("cannot decode a network record: %w", err)
	}
	if r.Version != recordVersion {
		return record{}, fmt.Errorf("cannot use a network record of version %d: this sandboxd knows %d", r.Version, recordVersion)
	}
	return r, nil
}

// removeRecord forgets a workload. The record goes before its directory, so that a directory without one means nothing.
func removeRecord(dir string) error {
	if err := os.Remove(filepath.Join(dir, recordFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove a network record: %w", err)
	}
	if err := os.RemoveAll(dir); err != nil {
		return fmt.Errorf("cannot remove a network record: %w", err)
	}
	return wholefile.SyncDir(filepath.Dir(dir))
}
