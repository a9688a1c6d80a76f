package image

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

// What images.db says of an image stands in a file of the image's own too, known/sha256-<hex>.json, written before images.db is:
// so a database that is damaged can be made anew, and nothing that a caller was told of is missing from it. While images.db is
// whole it counts, and these files are made to agree with it.

const (
	knownDir     = "known"
	knownSuffix  = ".json"
	knownVersion = 1
	// maxKnown bounds such a file: a record has the environment and the labels of a document of at most limits.document.
	maxKnown = 64 * mib
)

// known is what is kept of an image.
type known struct {
	Digest string   `json:"digest"`
	Names  []string `json:"names"`
	Record record   `json:"record"`
}

// knownFile is the file: the sum, CRC-32C, is of the bytes of Image.
type knownFile struct {
	Version int    `json:"version"`
	Sum     uint32 `json:"sum"`
	// The change of images.db that it was written for: of two images that have one name, the later has it.
	Change uint64          `json:"change"`
	Image  json.RawMessage `json:"image"`
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func knownName(digest string) string {
	return strings.Replace(digest, ":", "-", 1) + knownSuffix
}

func writeKnown(dir string, image []byte, digest string, change uint64) error {
	b, err := json.Marshal(knownFile{Version: knownVersion, Sum: crc32.Checksum(image, castagnoli), Change: change, Image: image})
	if err == nil {
		err = wholefile.ReplaceDurably(filepath.Join(dir, knownName(digest)), b)
	}
	if err != nil {
		return fmt.Errorf("cannot keep what is known of an image: %w", err)
	}
	return nil
}

func parseKnown(b []byte) (k known, f knownFile, err error) {
	if err := json.Unmarshal(b, &f); err != nil {
		return k, f, err
	}
	if f.Version != knownVersion || crc32.Checksum(f.Image, castagnoli) != f.Sum {
		return k, f, fmt.Errorf("version %d, or not its sum", f.Version)
	}
	return k, f, json.Unmarshal(f.Image, &k)
}

// eachKnown calls each for all whole files in dir.
func eachKnown(dir string, each func(k known, f knownFile)) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		b, err := wholefile.ReadOwn(filepath.Join(dir, e.Name()), maxKnown)
		if err != nil {
			continue // nothing is known by it
		}
		if k, f, err := parseKnown(b); err == nil && knownName(k.Digest) == e.Name() {
			each(k, f)
		}
	}
	return nil
}

// rawKnown gives the content of all whole files, by digest.
func rawKnown(dir string) (map[string][]byte, error) {
	all := map[string][]byte{}
	return all, eachKnown(dir, func(k known, f knownFile) { all[k.Digest] = f.Image })
}

// readKnown gives what all whole files say.
func readKnown(dir string) (map[string]known, error) {
	all, changes := map[string]known{}, map[string]uint64{}
	err := eachKnown(dir, func(k known, f knownFile) { all[k.Digest], changes[k.Digest] = k, f.Change })
	if err != nil {
		return nil, err
	}
	// A name goes with the last image that got it.
	owner := map[string]string{}
	for digest, k := range all {
		for _, n := range k.Names {
			if now, taken := owner[n]; !taken || changes[digest] > changes[now] {
				owner[n] = digest
			}
		}
	}
	for digest, k := range all {
		k.Names = slices.DeleteFunc(k.Names, func(n string) bool { return owner[n] != digest })
		all[digest] = k
	}
	return all, nil
}

// keepKnown has the files in dir say what all says: was is what they said so far. It answers with what they say now.
func keepKnown(dir string, was map[string][]byte, all map[string]known, change uint64) (map[string][]byte, error) {
	now := make(map[string][]byte, len(all))
	for digest, k := range all {
		b, err := json.Marshal(k)
		if err != nil {
			return nil, err
		}
		now[digest] = b
		if !bytes.Equal(b, was[digest]) {
			if err := writeKnown(dir, b, digest, change); err != nil {
				return nil, err
			}
		}
	}
	for digest := range was {
		if _, ok := now[digest]; ok {
			continue
		}
		if err := os.Remove(filepath.Join(dir, knownName(digest))); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("cannot forget an image: %w", err)
		}
	}
	return now, nil
}

// removeOthers removes what is in dir and of no image.
func removeOthers(dir string, all map[string][]byte) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	names := map[string]bool{}
	for digest := range all {
		names[knownName(digest)] = true
	}
	for _, e := range entries {
		if names[e.Name()] {
			continue
		}
		if err := os.RemoveAll(filepath.Join(dir, e.Name())); err != nil {
			return err
		}
	}
	return nil
}
