package container

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
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
	// preparedLife is how long after the last start of a kind roots of that kind are kept.
	preparedLife = time.Minute
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
	wanted  *preparation // what was started last
	forget  *time.Timer  // forgets that
	unfit   *preparation // what could not be made ahead of time
	warm    bool         // Warm was called
	used    time.Time    // when a sandbox last began, came to stand, or ended
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

// Prepares implements runtime.Preparer.
func (r *Runtime) Prepares() bool { return r.pool.c.Size > 0 }

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

// preparation is what a root is made like ahead of time.
type preparation struct {
	image  imageKey
	path   string
	config string // spec.Sandbox.Prepare
}

// wants says what somebody starts, which the next is likely to want as well.
func (p *pool) wants(s spec.Sandbox, img *os.File) *preparation {
	if p.c.Size == 0 || len(s.Prepare) == 0 {
		return nil
	}
	key, err := keyOf(img)
	if err != nil {
		return nil // the start will say so
	}
	w := &preparation{image: key, path: s.ImagePath, config: string(s.Prepare)}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.unfit != nil && *p.unfit == *w {
		return nil
	}
	p.wanted = w
	if p.forget != nil {
		p.forget.Stop()
	}
	p.forget = time.AfterFunc(preparedLife, p.unprepare)
	return w
}

// unprepare gives up what nobody has wanted for a while: an image that is removed lies on the disk as long as something has it.
func (p *pool) unprepare() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wanted = nil
	for i := len(p.waiting) - 1; i >= 0; i-- {
		if p.waiting[i].prepared != nil {
			p.dropLocked(i)
		}
	}
	p.fillLocked()
}

// dropLocked removes one that waits.
func (p *pool) dropLocked(i int) {
	st := p.waiting[i]
	p.waiting = slices.Delete(p.waiting, i, i+1)
	p.owned.Go(func() { p.discard(st) })
}

// take answers with one that waits and would do for s, nil if there is none: one whose root is what s wants, or one without.
func (p *pool) take(s spec.Sandbox, img *os.File) *start {
	if p.c.Size == 0 || s.Resources.DiskBytes != p.c.DiskBytes {
		return nil
	}
	want := p.wants(s, img)
	p.mu.Lock()
	defer p.mu.Unlock()
	defer p.fillLocked()
	for _, as := range []*preparation{want, nil} {
		for i := 0; i < len(p.waiting); {
			st := p.waiting[i]
			switch {
			case !st.preparedAs(as):
				i++
			case ended(st.agent.pidfd): // somebody killed it, or the host had no memory left
				p.dropLocked(i)
			default:
				p.waiting = slices.Delete(p.waiting, i, i+1)
				return st
			}
		}
		if as == nil {
			break
		}
	}
	if len(p.waiting) > 0 { // made for others: let there be one for this kind next time
		p.dropLocked(0)
	}
	return nil
}

// preparedAs reports whether its root was made so; a nil preparation is none.
func (st *start) preparedAs(p *preparation) bool {
	if st.prepared == nil || p == nil {
		return st.prepared == nil && p == nil
	}
	return *st.prepared == *p
}

// fillLocked has someone fill the pool, if nobody does.
func (p *pool) fillLocked() {
	if !p.warm || p.filling || p.ctx.Err() != nil || !p.lacksLocked() {
		return
	}
	p.filling = true
	p.owned.Go(p.fill)
}

// lacksLocked reports whether there is something to make.
func (p *pool) lacksLocked() bool { return len(p.waiting) < p.c.Size || p.bareLocked() >= 0 }

// bareLocked is the index of one that waits without a root and could have one, -1 if there is none: where there are several, one
// stays without, for who wants another root.
func (p *pool) bareLocked() int {
	if p.wanted == nil {
		return -1
	}
	bare := 0
	last := -1
	for i, st := range p.waiting {
		if st.prepared == nil {
			bare++
			last = i
		}
	}
	if bare <= 1 && p.c.Size > 1 {
		return -1
	}
	return last
}

func (p *pool) fill() {
	for {
		err := p.awaitQuiet()
		if err == nil {
			err = p.fillOne()
		}
		if err != nil && p.ctx.Err() == nil {
			p.r.log.Warn("cannot make a sandbox ahead of time", zap.Error(err))
			select {
			case <-time.After(poolRetry):
			case <-p.ctx.Done():
			}
		}
		p.mu.Lock()
		if p.ctx.Err() != nil || !p.lacksLocked() {
			p.filling = false
			p.mu.Unlock()
			return
		}
		p.mu.Unlock()
	}
}

// fillOne makes one more, or the root of one.
func (p *pool) fillOne() error {
	var st *start
	p.mu.Lock()
	want, bare := p.wanted, p.bareLocked()
	if bare >= 0 {
		st = p.waiting[bare]
		p.waiting = slices.Delete(p.waiting, bare, bare+1)
	}
	p.mu.Unlock()
	if st == nil {
		made, err := p.make()
		if err != nil {
			return err
		}
		st = made
	} else if err := p.prepare(st, want); err != nil {
		p.mu.Lock()
		p.unfit = want
		if p.wanted == want {
			p.wanted = nil
		}
		p.mu.Unlock()
		return errors.Join(err, p.undo(st))
	}
	p.mu.Lock()
	p.waiting = append(p.waiting, st)
	p.mu.Unlock()
	if bare >= 0 {
		fault.At("container from the pool", "prepared")
	} else {
		fault.At("container from the pool", "made")
	}
	return nil
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

// prepare makes the root of one that waits.
func (p *pool) prepare(st *start, want *preparation) error {
	img, err := openImage(want.path)
	if err != nil {
		return err // it was removed
	}
	defer img.Close() //nolint:errcheck // only read; the mount has its own reference
	if key, err := keyOf(img); err != nil || key != want.image {
		return errors.Join(err, errors.New("the image is another by now"))
	}
	ctx, cancel := context.WithTimeout(p.ctx, poolMakeLimit)
	defer cancel()
	st.imageFile = img
	for _, step := range steps {
		if !step.prepares {
			continue
		}
		if err := st.do(ctx, step); err != nil {
			return err
		}
	}
	if err := st.agent.prepare(ctx, st.bootFiles(), []byte(want.config)); err != nil {
		return err
	}
	st.prepared = want
	_ = st.root.Close() // the agent has its own
	st.root = nil
	if st.innerDoor != nil {
		_ = st.innerDoor.Close() // nothing was written
		st.innerDoor = nil
	}
	return nil
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
	p.mu.Lock()
	if p.forget != nil {
		p.forget.Stop()
	}
	p.mu.Unlock()
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
func (r *Runtime) finish(ctx context.Context, st *start, s spec.Sandbox, img *os.File, message func(runtime.Launching) ([]byte, error)) error {
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
		if step.ahead || step.prepares && st.prepared != nil {
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
	layer := func(id string) string { return layerDir(st.r.config.StateDir, id) }
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
	st.r.layers.rename(st.madeAs, s.ID)
	st.r.hide(st.madeAs, false)
	st.rec.ID, st.rec.DiskBytes, st.rec.PidsLimit, st.rec.Direct = s.ID, s.Resources.DiskBytes, s.Resources.Pids, s.Resources.LimitsWrites()
	if err := st.r.layers.setDirect(s.ID, st.rec.Direct); err != nil {
		return err
	}
	return st.group.Update(st.r.limits(s.Resources))
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
