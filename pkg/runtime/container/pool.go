package container

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Pool says how many sandboxes are made ahead of time.
type Pool struct {
	// How many wait; each costs about 3 MiB of memory and a loop device.
	Size int
	// The size of their writable layers: who asks for another finds none.
	DiskBytes uint64
}

const (
	// MaxPool bounds Pool.Size.
	MaxPool = 64
	// poolRetry is the pause after making one failed.
	poolRetry = 10 * time.Second
	// poolMakeLimit bounds making one.
	poolMakeLimit = time.Minute
	// poolQuiet is how long no sandbox must have begun or ended for one to be made ahead of time: making one while another
	// starts slows that down by more than it saves (on two cores 36 ms instead of 24, the other way round 16). Under a steady
	// load the pool runs empty, and starts are as fast as without.
	poolQuiet = 100 * time.Millisecond
)

// errTaken: something of the sandbox exists already, so that nothing made ahead of time can become it.
var errTaken = errors.New("it exists")

// pool keeps sandboxes that are made as far as is possible without knowing what they are for: with an id range, a cgroup, an
// empty layer that is mounted, and an agent in namespaces of its own that waits to be told its root. Each is used once, by one
// sandbox, and goes through the same steps as one that never waited, in the same order.
//
// A waiting one has an id of its own and a run directory with a record, as any sandbox: when the daemon dies its agent sees the
// boot socket closed and ends, and the next daemon's recovery removes it as one without a workload. When it is handed out its
// directory and its layer are renamed to the sandbox's id; the cgroup and the id range keep their names, which the record says.
type pool struct {
	r *Runtime
	c Pool

	ctx    context.Context
	cancel context.CancelFunc
	owned  sync.WaitGroup

	mu      sync.Mutex // guards what follows
	waiting []*start
	filling bool
	warm    bool      // Warm was called
	used    time.Time // when a sandbox last began, came to stand, or ended
}

func newPool(r *Runtime, c Pool) (*pool, error) {
	if c.Size < 0 || c.Size > MaxPool {
		return nil, fmt.Errorf("a pool of %d agents: it has 0 to %d", c.Size, MaxPool)
	}
	if c.Size > 0 && c.DiskBytes < disk.MinSize {
		return nil, fmt.Errorf("a pool with writable layers of %d bytes: they have at least %d", c.DiskBytes, uint64(disk.MinSize))
	}
	p := &pool{r: r, c: c}
	p.ctx, p.cancel = context.WithCancel(context.Background())
	return p, nil
}

// Warm begins to fill the pool. Call it after recovery, which would take what waits for what an earlier daemon left.
func (r *Runtime) Warm() {
	r.pool.mu.Lock()
	defer r.pool.mu.Unlock()
	r.pool.warm = true
	r.pool.fillLocked()
}

// note says that a sandbox begins or ends, or that it has.
func (p *pool) note() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.used = time.Now()
}

// awaitQuiet waits until it is time to make one.
func (p *pool) awaitQuiet() error {
	for {
		p.mu.Lock()
		wait := poolQuiet - time.Since(p.used)
		p.mu.Unlock()
		if wait <= 0 {
			return p.ctx.Err()
		}
		select {
		case <-time.After(wait):
		case <-p.ctx.Done():
			return p.ctx.Err()
		}
	}
}

// take answers with one that waits and would do for s, nil if there is none.
func (p *pool) take(s spec.Sandbox) *start {
	if p.c.Size == 0 || s.Resources.DiskBytes != p.c.DiskBytes {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.waiting) > 0 {
		st := p.waiting[0]
		p.waiting = p.waiting[1:]
		p.fillLocked()
		if !ended(st.agent.pidfd) {
			return st
		}
		// Somebody killed it, or the host had no memory left.
		p.owned.Go(func() { p.discard(st) })
	}
	return nil
}

// fillLocked has someone fill the pool, if nobody does.
func (p *pool) fillLocked() {
	if !p.warm || p.filling || p.ctx.Err() != nil || len(p.waiting) >= p.c.Size {
		return
	}
	p.filling = true
	p.owned.Go(p.fill)
}

func (p *pool) fill() {
	for {
		var st *start
		err := p.awaitQuiet()
		if err == nil {
			st, err = p.make()
		}
		if err != nil && p.ctx.Err() == nil {
			p.r.log.Warn("cannot make a sandbox ahead of time", zap.Error(err))
			select {
			case <-time.After(poolRetry):
			case <-p.ctx.Done():
			}
		}
		p.mu.Lock()
		if st != nil {
			p.waiting = append(p.waiting, st)
		}
		if p.ctx.Err() != nil || len(p.waiting) >= p.c.Size {
			p.filling = false
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
	}
}

// make takes the steps that can be taken ahead of time.
func (p *pool) make() (*start, error) {
	ctx, cancel := context.WithTimeout(p.ctx, poolMakeLimit)
	defer cancel()
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return nil, err
	}
	id := hex.EncodeToString(b[:])
	p.r.hide(id, true)
	if err := newDir(p.r.dir(id)); err != nil {
		p.r.hide(id, false)
		return nil, err
	}
	st := &start{r: p.r, s: spec.Sandbox{ID: id, Resources: spec.Resources{DiskBytes: p.c.DiskBytes}}, madeAs: id}
	for _, step := range steps {
		if !step.ahead {
			continue
		}
		if err := st.do(ctx, step); err != nil {
			return nil, errors.Join(err, p.undo(st))
		}
	}
	if err := st.await(); err != nil {
		return nil, errors.Join(err, p.undo(st))
	}
	return st, nil
}

// undo leaves nothing of one that was not handed out.
func (p *pool) undo(st *start) error {
	st.fresh = true
	defer p.r.hide(st.madeAs, false)
	return st.undo(context.Background())
}

func (p *pool) discard(st *start) {
	if err := p.undo(st); err != nil {
		p.r.log.Warn("cannot remove a sandbox that was made ahead of time", zap.String("sandbox", st.madeAs), zap.Error(err))
	}
}

// close removes what waits.
func (p *pool) close() error {
	p.cancel()
	p.owned.Wait()
	p.mu.Lock()
	waiting := p.waiting
	p.waiting = nil
	p.mu.Unlock()
	var err error
	for _, st := range waiting {
		err = errors.Join(err, p.undo(st))
	}
	return err
}

// finish makes a sandbox of one that waited, by the steps that are left. errTaken: nothing was done.
func (r *Runtime) finish(ctx context.Context, st *start, s spec.Sandbox, img *os.File, message func(runtime.Facts) ([]byte, error)) error {
	if err := st.become(s, img); err != nil {
		if errors.Is(err, errTaken) {
			r.pool.discard(st)
			return err
		}
		return errors.Join(&stepError{"record", fmt.Errorf("cannot start sandbox %s: %w", s.ID, err)}, st.undo(ctx))
	}
	defer st.close()
	st.launch = message
	for _, step := range steps {
		if step.ahead {
			continue
		}
		if err := st.do(ctx, step); err != nil {
			return errors.Join(err, st.undo(ctx))
		}
	}
	return nil
}

// become gives what waited the sandbox's id and limits. The record names the cgroup and the ids from the first instant on, and
// each rename is atomic: whenever the daemon dies, removing the sandbox removes all of it.
func (st *start) become(s spec.Sandbox, img *os.File) error {
	defer phase.Begin(s.ID, "start: from the pool")()
	layer := func(id string) string { return filepath.Dir(disk.LayerPath(st.r.config.StateDir, id)) }
	// A layer of an earlier run is not to be replaced by an empty one.
	if _, err := os.Lstat(layer(s.ID)); !errors.Is(err, fs.ErrNotExist) {
		return errTaken
	}
	if err := renameNew(st.r.dir(st.madeAs), st.r.dir(s.ID)); err != nil {
		return err
	}
	fault.At("container from the pool", "directory named")
	st.s, st.imageFile, st.fresh = s, img, false
	if err := renameNew(layer(st.madeAs), layer(s.ID)); err != nil {
		return fmt.Errorf("cannot name the writable layer: %v", err) // not errTaken: something was done
	}
	fault.At("container from the pool", "layer named")
	st.fresh = true
	st.r.unmounts.forget(st.madeAs)
	st.r.unmounts.mounted(s.ID, st.loop, disk.LayerPath(st.r.config.StateDir, s.ID))
	st.r.hide(st.madeAs, false)
	st.rec.ID, st.rec.DiskBytes, st.rec.PidsLimit = s.ID, s.Resources.DiskBytes, s.Resources.Pids
	return st.group.Limit(st.r.limits(s.Resources))
}

// renameNew renames to a name that must be free, errTaken if it is not.
func renameNew(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EEXIST) {
		return errTaken
	}
	if err != nil {
		return fmt.Errorf("cannot rename %s: %w", from, err)
	}
	return nil
}
