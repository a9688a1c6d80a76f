package workload

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

// snapshotRecord is what is kept of a snapshot. It is on the disk before anything else of it is, and goes first.
type snapshotRecord struct {
	Snapshot
	// Whole: without it the snapshot was being made, and its workload may stand still.
	Ready     bool `json:"ready"`
	Transient bool `json:"transient,omitempty"`
	// As in the workload's record.
	Asked spec.Resources `json:"asked"`
	Run   int            `json:"run"`
	// How much of its output its agent had been asked for.
	Output uint64 `json:"output"`
	// The configuration its agent was given.
	Config json.RawMessage `json:"config,omitempty"`

	users   int  // guarded by snapshotStore.mu: those who read it
	deleted bool // guarded by snapshotStore.mu
}

// snapshotStore keeps snapshots in StateDir/snapshots/<id>/, 0700: record.json, and in data what the runtime makes.
type snapshotStore struct {
	dir string
	log *zap.Logger

	mu    sync.Mutex
	known map[string]*snapshotRecord // guarded by mu; those being made too
	// Those that a daemon which died was making or had for a fork: Recover settles them.
	interrupted map[string]*snapshotRecord
}

const (
	snapshotRecordFile = "record.json"
	snapshotDataDir    = "data"
	// maxSnapshotRecord bounds a record: a spec has at most the size of a request, and its configuration twice that.
	maxSnapshotRecord = 16 << 20
)

var snapshotID = regexp.MustCompile(`^[0-9a-f]{32}$`)

func openSnapshots(dir string, log *zap.Logger) (*snapshotStore, error) {
	s := &snapshotStore{dir: dir, log: log, known: map[string]*snapshotRecord{}, interrupted: map[string]*snapshotRecord{}}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the snapshots' directory: %w", err)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot list snapshots: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		b, err := wholefile.ReadOwn(filepath.Join(path, snapshotRecordFile), maxSnapshotRecord)
		if errors.Is(err, fs.ErrNotExist) {
			// Half removed, or its record was never written.
			if err := os.RemoveAll(path); err != nil {
				return nil, fmt.Errorf("cannot remove half a snapshot: %w", err)
			}
			continue
		}
		var r *snapshotRecord
		if err == nil {
			r, err = parseSnapshotRecord(b)
		}
		if err == nil && r.ID != e.Name() {
			err = errors.New("it is another's")
		}
		switch {
		case err != nil:
			log.Error("cannot read the record of a snapshot, which is left as it is: look at it, then remove its directory", zap.String("directory", path), zap.Error(err))
		case r.Ready && !r.Transient:
			s.known[r.ID] = r
		default:
			s.interrupted[r.ID] = r
		}
	}
	return s, nil
}

// data is the directory that the runtime fills.
func (s *snapshotStore) data(r *snapshotRecord) string {
	return filepath.Join(s.dir, r.ID, snapshotDataDir)
}

// begin records a snapshot that is about to be made, and holds it.
func (s *snapshotStore) begin(r *snapshotRecord) error {
	s.mu.Lock()
	for _, other := range s.known {
		if other.Name == r.Name {
			s.mu.Unlock()
			return spec.Errorf(spec.KindAlreadyExists, "the name %q is taken by snapshot %s: choose another or remove it with `sandboxctl snapshot rm`", r.Name, other.ID[:12])
		}
	}
	r.users = 1
	s.known[r.ID] = r
	s.mu.Unlock()
	dir := filepath.Join(s.dir, r.ID)
	err := os.Mkdir(dir, 0o700)
	if err == nil {
		err = s.write(r)
	}
	if err == nil {
		err = os.Mkdir(s.data(r), 0o700)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("cannot record a snapshot: %w", err), s.drop(r))
	}
	return nil
}

// finish records that a snapshot is whole.
func (s *snapshotStore) finish(r *snapshotRecord) error {
	s.mu.Lock()
	r.Ready = true
	s.mu.Unlock()
	return s.write(r)
}

func (s *snapshotStore) write(r *snapshotRecord) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("cannot encode a snapshot's record: %w", err)
	}
	if err := wholefile.ReplaceDurably(filepath.Join(s.dir, r.ID, snapshotRecordFile), b); err != nil {
		return fmt.Errorf("cannot write a snapshot's record: %w", err)
	}
	return nil
}

// drop removes a snapshot that is held. The record goes first: without it the rest is nothing.
func (s *snapshotStore) drop(r *snapshotRecord) error {
	dir := filepath.Join(s.dir, r.ID)
	err := os.Remove(filepath.Join(dir, snapshotRecordFile))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	fault.At("snapshot", "record removed")
	if err == nil {
		err = os.RemoveAll(dir)
	}
	if err != nil {
		return fmt.Errorf("cannot remove snapshot %s: %w", r.ID[:12], err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.known, r.ID)
	delete(s.interrupted, r.ID)
	return nil
}

func (s *snapshotStore) findLocked(ref string) (*snapshotRecord, error) {
	var found *snapshotRecord
	for id, r := range s.known {
		switch {
		case !r.Ready || r.Transient || r.deleted:
			continue
		case id == ref, r.Name == ref:
			return r, nil
		case len(ref) >= minPrefix && strings.HasPrefix(id, ref):
			if found != nil {
				return nil, spec.Invalidf("id", "%q is the beginning of more than one snapshot's id: give more digits", ref)
			}
			found = r
		}
	}
	if found == nil {
		return nil, SnapshotNotFound(ref)
	}
	return found, nil
}

// hold finds a snapshot and keeps it until release.
func (s *snapshotStore) hold(ref string) (*snapshotRecord, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, err := s.findLocked(ref)
	if err == nil {
		r.users++
	}
	return r, err
}

func (s *snapshotStore) release(r *snapshotRecord) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.users--
}

func (s *snapshotStore) delete(ref string) error {
	s.mu.Lock()
	r, err := s.findLocked(ref)
	if err == nil && r.users > 0 {
		err = spec.Errorf(spec.KindWrongState, "snapshot %s is in use: a workload is just being made of it; remove it when that runs", r.ID[:12])
	}
	if err == nil {
		r.deleted = true
	}
	s.mu.Unlock()
	if err != nil {
		return err
	}
	return s.drop(r)
}

func (s *snapshotStore) list(visible func(Snapshot) bool) []Snapshot {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := []Snapshot{}
	for _, r := range s.known {
		if r.Ready && !r.Transient && !r.deleted && (visible == nil || visible(r.Snapshot)) {
			out = append(out, r.Snapshot)
		}
	}
	slices.SortFunc(out, func(a, b Snapshot) int {
		if c := a.CreatedAt.Compare(b.CreatedAt); c != 0 {
			return c
		}
		return strings.Compare(a.ID, b.ID)
	})
	return out
}

// size is how many there are, those being made included, and what they take.
func (s *snapshotStore) size() (count int, bytes uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.known {
		bytes += r.MemoryBytes + r.DiskBytes
	}
	return len(s.known), bytes
}

// uses reports whether a snapshot needs the image of a digest.
func (s *snapshotStore) uses(digest string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.known {
		if r.ImageDigest == digest {
			return true
		}
	}
	return false
}

// interruptedOf are those of a workload that a daemon died over.
func (s *snapshotStore) interruptedOf(workload string) (out []*snapshotRecord) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.interrupted {
		if r.WorkloadID == workload {
			out = append(out, r)
		}
	}
	return out
}
