package workload

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

// record is what is kept of a workload across restarts.
type record struct {
	Workload
	// The boot of the host that the last start was in.
	Boot string `json:"boot,omitempty"`
	// Starts so far. Each run has a process of its own in the agent, named by runProcess.
	Run int `json:"run"`
	// Output bytes in the log when the current run began: the agent counts from there.
	LogBase uint64 `json:"logBase,omitempty"`
	// Output bytes that the process had been read of when it was somebody else's: a workload that goes on from a snapshot has the
	// rest, in its first run.
	OutputBefore uint64 `json:"outputBefore,omitempty"`
	// It is to go on from a snapshot and has not yet: without that it is nothing.
	Restoring bool `json:"restoring,omitempty"`
	// Its removal by force was asked for: whoever kills it removes it too, the next daemon if this one dies.
	Condemned bool `json:"condemned,omitempty"`
	// Resources as asked for, zero where nothing was: what they default to is in Spec.
	Asked spec.Resources `json:"asked"`
	// Who created it.
	Caller spec.Caller `json:"caller"`
	// Of a creation with an idempotency key.
	Once *once `json:"once,omitempty"`
	// The configuration the agent was given, to be stored with the record but not read with it: it is large, and written once
	// a run.
	config []byte
}

// store keeps the records in a journal: each change is appended, the last of an id counts (journal.go has the format).
//
// A change is written when put or delete returns: the daemon may die at any instant from then on. It outlives the host's
// death too once sync has returned for it. That is what costs time, and many callers share one wait for the disk.
// docs/decisions says which changes are synced, and before what.
type store struct {
	dir  string
	lock *os.File // held by the daemon that has the journal open

	mu      sync.Mutex // guards what follows
	journal *journal
	// Where in the journal what counts of each id is.
	live map[string]places
	// Changes are numbered from 1; those up to synced are on the disk.
	written, synced uint64
	// One caller at a time waits for the disk, for all that are there by then.
	syncing bool
	changed sync.Cond
	// How large the journal must be for the next try to write it anew.
	compactAt int64
	// After a failed write or sync nobody knows what is on the disk: what was, is; nothing more is taken.
	broken error
}

// entryOf is one change: a workload's record, or its end when there is none.
type entryOf struct {
	ID     string  `json:"id"`
	Record *record `json:"record,omitempty"`
	// Of the last run that came to RUNNING: it counts until another comes.
	Config json.RawMessage `json:"config,omitempty"`
}

// places are the last change of an id, and the last that had a configuration.
type places struct{ record, config place }

const (
	journalFile = "workloads.journal"
	lockFile    = "workloads.lock"
	formerFile  = "workloads.db"
	// damagedSuffix, a dash and a number follow the journal's name in that of the copy of a damaged one.
	damagedSuffix = "damaged"
	// storeLockWait bounds the wait for another daemon that has the journal open.
	storeLockWait = 2 * time.Second
	storeLockPoll = 20 * time.Millisecond
	// A journal is written anew when it is larger than compactMin and compactFactor times what counts in it.
	compactMin    = 8 << 20
	compactFactor = 4
)

func openStore(dir string) (_ *store, err error) {
	s := &store{dir: dir, live: map[string]places{}}
	s.changed.L = &s.mu
	// What this program no longer reads must not look like no workloads at all: their sandboxes would be removed as strays.
	if _, err := os.Lstat(filepath.Join(dir, formerFile)); err == nil {
		return nil, fmt.Errorf("cannot use the records in %s: an earlier sandboxd wrote them; remove its workloads with it, then %s", dir, formerFile)
	}
	if s.lock, err = lockStore(filepath.Join(dir, lockFile)); err != nil {
		return nil, err
	}
	s.journal, err = openJournal(s.path(), func(at place, payload []byte) error {
		var e entryOf
		if err := json.Unmarshal(payload, &e); err != nil {
			return err
		}
		s.noteLocked(e, at)
		return nil
	})
	if err == nil && s.journal.damaged > 0 {
		err = s.repair()
	}
	if err != nil {
		return nil, errors.Join(err, s.lock.Close())
	}
	return s, nil
}

// repair has the journal hold what is whole of one that is damaged, and keeps the damaged one under another name.
func (s *store) repair() error {
	kept := fmt.Sprintf("%s.%s-%d", s.path(), damagedSuffix, time.Now().UnixNano())
	b, err := os.ReadFile(s.path())
	if err == nil {
		err = wholefile.ReplaceDurably(kept, b)
	}
	if err != nil {
		return fmt.Errorf("cannot keep a copy of %s, which is damaged at byte %d: make room, and start sandboxd again: %w", s.path(), s.journal.damaged, err)
	}
	next, live, err := s.journal.rewrite(s.path(), s.live)
	if err != nil {
		return fmt.Errorf("cannot repair %s, of which %s is a copy: %w", s.path(), kept, err)
	}
	s.journal, s.live = next, live
	return nil
}

// damaged are the copies of damaged journals that somebody still has to look at: as long as there is one, workloads may be
// missing whose sandboxes are there.
func (s *store) damaged() ([]string, error) {
	return filepath.Glob(s.path() + "." + damagedSuffix + "-*")
}

func (s *store) path() string { return filepath.Join(s.dir, journalFile) }

func lockStore(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open the workloads' lock: %w", err)
	}
	for begin := time.Now(); ; time.Sleep(storeLockPoll) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errors.Join(fmt.Errorf("cannot lock %s: %w", path, err), f.Close())
		}
		if time.Since(begin) > storeLockWait {
			return nil, errors.Join(spec.Errorf(spec.KindUnavailable, "cannot open %s: another sandboxd has it open; stop it or use another --state-dir", filepath.Dir(path)), f.Close())
		}
	}
}

func (s *store) noteLocked(e entryOf, at place) {
	if e.Record == nil {
		delete(s.live, e.ID)
		return
	}
	counts := s.live[e.ID]
	counts.record = at
	if e.Config != nil {
		counts.config = at
	}
	s.live[e.ID] = counts
}

// put writes a record and answers with what sync takes.
func (s *store) put(r *record) (uint64, error) {
	return s.write(entryOf{ID: r.ID, Record: r, Config: r.config})
}

// delete writes that a workload is no more.
func (s *store) delete(id string) (uint64, error) { return s.write(entryOf{ID: id}) }

func (s *store) write(e entryOf) (uint64, error) {
	b, err := json.Marshal(e)
	if err != nil {
		return 0, fmt.Errorf("cannot encode record: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken != nil {
		return 0, s.broken
	}
	if err := s.compactLocked(); err != nil {
		return 0, err
	}
	at, err := s.journal.append(b)
	if err != nil {
		// The next change overwrites what was written of this one.
		return 0, fmt.Errorf("cannot store record: %w", err)
	}
	s.noteLocked(e, at)
	s.written++
	return s.written, nil
}

// sync returns when the change, and every one before it, is on the disk.
func (s *store) sync(change uint64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		switch {
		case s.synced >= change:
			return nil
		case s.broken != nil:
			return s.broken
		case s.syncing:
			s.changed.Wait()
			continue
		}
		s.syncing = true
		upTo, j := s.written, s.journal
		s.mu.Unlock()
		err := j.sync()
		s.mu.Lock()
		s.syncing = false
		if err != nil {
			s.broken = fmt.Errorf("cannot store record: the disk failed, and what it holds is not known: restart sandboxd when it is mended: %w", err)
		} else {
			s.synced = max(s.synced, upTo)
		}
		s.changed.Broadcast()
	}
}

// compactLocked writes the journal anew when most of it no longer counts.
func (s *store) compactLocked() error {
	size := s.journal.size
	if size < max(fault.Instead[int64](compactMin, 64<<10), s.compactAt) {
		return nil
	}
	counts := int64(0)
	for _, at := range s.live {
		counts += at.record.length + at.config.length
	}
	if size < compactFactor*counts {
		return nil
	}
	for s.syncing { // who waits for the old file's sync must not find it closed
		s.changed.Wait()
	}
	next, live, err := s.journal.rewrite(s.path(), s.live)
	if next == nil {
		s.compactAt = 2 * size // a full disk, perhaps: not again at every change
		return nil
	}
	// It has the name by now, whatever err says.
	s.journal, s.live, s.compactAt = next, live, 0
	if err != nil {
		s.broken = fmt.Errorf("cannot write records anew: restart sandboxd when the disk is mended: %w", err)
		return s.broken
	}
	s.synced = s.written
	return nil
}

func (s *store) all() ([]*record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*record
	for id, at := range s.live {
		e, err := s.readLocked(at.record)
		if err != nil {
			return nil, fmt.Errorf("cannot read record %s: %w", id, err)
		}
		out = append(out, e.Record)
	}
	return out, nil
}

// config is what put was last given for a workload, nil if nothing.
func (s *store) config(id string) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	at := s.live[id].config
	if at.length == 0 {
		return nil, nil
	}
	e, err := s.readLocked(at)
	if err != nil {
		return nil, fmt.Errorf("cannot read the configuration of workload %s: %w", id, err)
	}
	return e.Config, nil
}

func (s *store) readLocked(at place) (e entryOf, err error) {
	b, err := s.journal.read(at)
	if err == nil {
		err = json.Unmarshal(b, &e)
	}
	return e, err
}

// close syncs what was written; nothing may be written afterwards.
func (s *store) close() error {
	s.mu.Lock()
	last := s.written
	s.mu.Unlock()
	err := s.sync(last)
	return errors.Join(err, s.journal.close(), s.lock.Close())
}
