// Package idrange hands out ranges of host user and group ids, one per sandbox, so that no two sandboxes of a host share
// an id, whichever daemon made them.
//
// A range is one symbolic link in a directory that all daemons of the host share: its name is the range's first id, its
// target the owner. Making a link is atomic, fails when the name is taken and carries its content from the first
// instant, so there is no lock, and a daemon that dies leaves either nothing or a whole allocation. Nothing is synced:
// ids are only ever those of living processes (on disk ids are stored unshifted), and no process survives the host.
package idrange

import (
	"errors"
	"fmt"
	"hash/fnv"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"sync"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// Size is how many ids a range holds: 0 to 65535, what images expect.
	Size = 65536
	// firstBase to lastBase are the ids 0x70000000 to 0x7fffffff, which systemd's table of uids
	// (https://systemd.io/UIDS-GIDS) leaves unused: above nspawn's containers, below 2^31, far from /etc/subuid's 100000.
	firstBase = 0x70000000
	lastBase  = 0x7fff0000
	slots     = (lastBase-firstBase)/Size + 1
)

// ownerPattern keeps a link's target readable and harmless.
var ownerPattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$`)

// Allocator is safe for concurrent use, by several processes too; an owner is one process's at a time.
type Allocator struct {
	dir string

	// What the links said when the directory was last changed at the time asOf, so that not all of them are read for each
	// sandbox. Guarded by mu.
	mu     sync.Mutex
	owners map[string]uint32
	asOf   time.Time
}

// Open uses the directory dir, which is made (0700) if it is missing. Every daemon of a host must be given the same one;
// a directory that a reboot empties (below /run) is best.
func Open(dir string) (*Allocator, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the id range directory: %w", err)
	}
	st, err := os.Lstat(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot examine the id range directory: %w", err)
	}
	if !st.IsDir() {
		return nil, fmt.Errorf("cannot use %s for id ranges: it is no directory", dir)
	}
	if st.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("cannot use %s for id ranges: others may write to it; chmod it to 0700", dir)
	}
	return &Allocator{dir: dir}, nil
}

// refreshLocked reads all links if the directory was changed by others.
func (a *Allocator) refreshLocked() error {
	info, err := os.Stat(a.dir)
	if err != nil {
		return fmt.Errorf("cannot list id ranges: %w", err)
	}
	if a.owners != nil && info.ModTime().Equal(a.asOf) {
		return nil
	}
	entries, err := os.ReadDir(a.dir)
	if err != nil {
		return fmt.Errorf("cannot list id ranges: %w", err)
	}
	owners := make(map[string]uint32, len(entries))
	for _, e := range entries {
		base, err := strconv.ParseUint(e.Name(), 10, 32)
		if err != nil || base < firstBase || base > lastBase || base%Size != 0 {
			continue
		}
		owner, err := os.Readlink(a.path(uint32(base)))
		if errors.Is(err, fs.ErrNotExist) {
			continue // released since
		}
		if err != nil {
			return fmt.Errorf("cannot read an id range: %w", err)
		}
		owners[owner] = uint32(base)
	}
	// As of before they were read: what changed meanwhile is read next time.
	a.owners, a.asOf = owners, info.ModTime()
	return nil
}

// changedLocked: the directory was changed by this process, and the index with it. What another changed in the same instant
// is not in it: that is no owner of ours.
func (a *Allocator) changedLocked() {
	if info, err := os.Stat(a.dir); err == nil {
		a.asOf = info.ModTime()
	}
}

// Allocate answers with the first id of owner's range, a new one if it has none yet.
func (a *Allocator) Allocate(owner string) (uint32, error) {
	if !ownerPattern.MatchString(owner) {
		return 0, fmt.Errorf("cannot allocate an id range: %q is no valid owner", owner)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	base, err := a.lookupLocked(owner)
	if err == nil || spec.KindOf(err) != spec.KindNotFound {
		return base, err
	}
	// Owners start at different places, so that a free range is usually found at the first try.
	h := fnv.New32a()
	_, _ = h.Write([]byte(owner)) // a hash never fails
	start := h.Sum32() % slots
	for i := range uint32(slots) {
		base := firstBase + (start+i)%slots*Size
		err := os.Symlink(owner, a.path(base))
		if err == nil {
			a.owners[owner] = base
			a.changedLocked()
			return base, nil
		}
		if !errors.Is(err, fs.ErrExist) {
			return 0, fmt.Errorf("cannot allocate an id range: %w", err)
		}
	}
	return 0, spec.Errorf(spec.KindExhausted, "cannot allocate an id range: all %d of %s are in use; remove sandboxes", slots, a.dir)
}

// Lookup answers with the first id of owner's range, an error of KindNotFound if it has none.
func (a *Allocator) Lookup(owner string) (uint32, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.lookupLocked(owner)
}

func (a *Allocator) lookupLocked(owner string) (uint32, error) {
	if err := a.refreshLocked(); err != nil {
		return 0, err
	}
	base, ok := a.owners[owner]
	if !ok {
		return 0, spec.Errorf(spec.KindNotFound, "%s has no id range", owner)
	}
	return base, nil
}

// Release gives owner's range back; nothing happens if it has none. No process may use its ids any more.
func (a *Allocator) Release(owner string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	base, err := a.lookupLocked(owner)
	if spec.KindOf(err) == spec.KindNotFound && err != nil {
		return nil
	}
	if err != nil {
		return err
	}
	if err := os.Remove(a.path(base)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot release an id range: %w", err)
	}
	delete(a.owners, owner)
	a.changedLocked()
	return nil
}

func (a *Allocator) path(base uint32) string {
	return filepath.Join(a.dir, strconv.FormatUint(uint64(base), 10))
}
