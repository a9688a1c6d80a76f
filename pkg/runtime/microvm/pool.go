package microvm

import (
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// MaxPool bounds PoolConfig.Size.
	MaxPool = 64
	// defaultPoolBytes is PoolConfig.MaxBytes if that is 0.
	defaultPoolBytes = 2 << 30
	// poolQuiet is how long no VM must have begun to start for a clone to be made ahead of time: making one beside a start costs
	// that start more than it will save.
	poolQuiet = 200 * time.Millisecond
	// maxPoolKinds bounds what is known of what was started.
	maxPoolKinds = 64
)

// PoolConfig says how many clones of each template are made ahead of time.
type PoolConfig struct {
	// How many wait for each kind of VM; 0 for none.
	Size int
	// Bytes of guest memory that all those have together; 0 for 2 GiB. Kinds that were not started for longest make room.
	MaxBytes uint64
}

// poolKind is what clones that wait have in common, and a VM that is to be one of them must have, too.
type poolKind struct {
	template templateKey
	// Of the writable layer.
	disk uint64
}

// poolOf is what waits of one kind.
type poolOf struct {
	// What another is made like, and whether nobody may try for now because it failed: the next start of the kind ends that.
	sandbox spec.Sandbox
	guest   *guest
	accel   string
	failed  bool

	used    time.Time
	waiting []*instance
}

// pool keeps clones that have come up, were told their own token and random bytes, and were stopped then: what is left to do is
// to let one go on. Each is used once, by one sandbox, and is told host name, address, time and more random bytes as any VM.
//
// A waiting one has an id, a directory and a record of its own, as any VM. The next daemon's recovery removes what a dead one left, as
// VMs without a workload. When it is handed out, its directory and its layer are renamed to the sandbox's id; cgroup and user
// id keep their names, which the record says.
//
// One is made at a time, while nothing starts.
type pool struct {
	r *Runtime
	c PoolConfig

	mu      sync.Mutex // guards what follows; templateStore.mu is taken before it
	kinds   map[poolKind]*poolOf
	filling bool
	// Ids of those being made, and of those that wait: nobody may take them for something left behind.
	hidden map[string]bool
	// Starts under way, and when the last one ended.
	starting int
	quiet    time.Time
}

func newPool(r *Runtime, c PoolConfig) (*pool, error) {
	if c.Size < 0 || c.Size > MaxPool {
		return nil, fmt.Errorf("a pool of %d clones for each template: it has 0 to %d", c.Size, MaxPool)
	}
	c.MaxBytes = cmp.Or(c.MaxBytes, defaultPoolBytes)
	return &pool{r: r, c: c, kinds: map[poolKind]*poolOf{}, hidden: map[string]bool{}}, nil
}

// begin says that a start begins; its result, that it has ended.
func (p *pool) begin() (end func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.starting++
	return func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		p.starting--
		p.quiet = time.Now()
	}
}

// kindOf is what s would be taken from. Where writes are limited QEMU is told so as it starts, so that such a VM can't have waited.
func (p *pool) kindOf(s spec.Sandbox, key templateKey) (poolKind, bool) {
	return poolKind{key, s.Resources.DiskBytes}, p.c.Size > 0 && !s.Resources.LimitsWrites()
}

// want has clones of a template made ahead of time, for VMs like s: who started one starts others.
func (p *pool) want(s spec.Sandbox, key templateKey, g *guest, accel string) {
	kind, can := p.kindOf(s, key)
	if !can {
		return
	}
	t := p.r.templates.current(key)
	if t == nil {
		return
	}
	defer t.release()
	p.mu.Lock()
	defer p.mu.Unlock()
	of := p.kinds[kind]
	if of == nil {
		of = &poolOf{}
		p.kinds[kind] = of
	}
	of.sandbox, of.guest, of.accel, of.failed, of.used = bareSandbox(s), g, accel, false, time.Now()
	if len(p.kinds) > maxPoolKinds {
		p.forgetLocked(p.oldestLocked(nil))
	}
	p.fillLocked()
}

// bareSandbox is s without anything that is one workload's own.
func bareSandbox(s spec.Sandbox) spec.Sandbox {
	return spec.Sandbox{ImagePath: s.ImagePath, Resources: templateResources(s.Resources), Network: s.Network, TemplateScope: s.TemplateScope}
}

// take answers with one that waits, nil if there is none.
func (p *pool) take(kind poolKind) *instance {
	p.mu.Lock()
	defer p.mu.Unlock()
	of := p.kinds[kind]
	if of == nil {
		return nil
	}
	for len(of.waiting) > 0 {
		i := of.waiting[0]
		of.waiting = of.waiting[1:]
		if !i.hasEnded() {
			return i
		}
		p.discardLocked(i) // somebody killed it, or the host had no memory left
	}
	return nil
}

// forgetLocked removes what waits of a kind, and no more is made of it.
func (p *pool) forgetLocked(kind poolKind) {
	of := p.kinds[kind]
	delete(p.kinds, kind)
	for _, i := range of.waiting {
		p.discardLocked(i)
	}
}

// dropped removes the clones of a template that is gone. templateStore.mu is held.
func (p *pool) dropped(key templateKey) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for kind := range p.kinds {
		if kind.template == key {
			p.forgetLocked(kind)
		}
	}
}

// waiting is how many clones of a template wait.
func (p *pool) waiting(key templateKey) (n int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for kind, of := range p.kinds {
		if kind.template == key {
			n += len(of.waiting)
		}
	}
	return n
}

// hides reports whether an id is of one that waits, or is being made.
func (p *pool) hides(id string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.hidden[id]
}

// bytesLocked is the guest memory of all that wait.
func (p *pool) bytesLocked() (sum uint64) {
	for _, of := range p.kinds {
		sum += uint64(len(of.waiting)) * guestBytes(of.sandbox.Resources)
	}
	return sum
}

// oldestLocked is the kind not started for longest of those that which says; of all if that is nil.
func (p *pool) oldestLocked(which func(*poolOf) bool) (oldest poolKind) {
	var found *poolOf
	for kind, of := range p.kinds {
		if (which == nil || which(of)) && (found == nil || of.used.Before(found.used)) {
			oldest, found = kind, of
		}
	}
	return oldest
}

// lackLocked is the kind of which the next is to be made: that was started last and has too few. Older kinds make room for it, one
// clone at a time, and never newer ones.
func (p *pool) lackLocked() (poolKind, bool) {
	var kinds []poolKind
	for kind := range p.kinds {
		kinds = append(kinds, kind)
	}
	slices.SortFunc(kinds, func(a, b poolKind) int { return p.kinds[b].used.Compare(p.kinds[a].used) })
	for n, kind := range kinds {
		of := p.kinds[kind]
		need := guestBytes(of.sandbox.Resources)
		if of.failed || len(of.waiting) >= p.c.Size || need > p.c.MaxBytes {
			continue
		}
		for _, older := range slices.Backward(kinds[n+1:]) {
			for o := p.kinds[older]; len(o.waiting) > 0 && p.bytesLocked()+need > p.c.MaxBytes; o.waiting = o.waiting[1:] {
				p.discardLocked(o.waiting[0])
			}
		}
		if p.bytesLocked()+need <= p.c.MaxBytes {
			return kind, true
		}
	}
	return poolKind{}, false
}

// fillLocked has someone fill the pool, if nobody does.
func (p *pool) fillLocked() {
	if p.filling || p.r.life.Err() != nil {
		return
	}
	p.filling = true
	p.r.makers.Go(p.fill)
}

// fill makes what is lacking, one after another.
func (p *pool) fill() {
	for p.awaitQuiet() {
		p.mu.Lock()
		kind, lacking := p.lackLocked()
		if !lacking {
			p.filling = false
			p.mu.Unlock()
			return
		}
		of := p.kinds[kind]
		like := *of
		p.mu.Unlock()
		if err := p.fillOne(kind, of, like); err != nil && p.r.life.Err() == nil {
			p.r.cfg.Logger.Warn("cannot make a clone ahead of time: the next start of its kind has it tried again", zap.String("template", kind.template.short()), zap.Error(err))
			p.mu.Lock()
			of.failed = true
			p.mu.Unlock()
		}
	}
}

// awaitQuiet waits until it is time to make one; false at the daemon's end.
func (p *pool) awaitQuiet() bool {
	for {
		p.mu.Lock()
		wait := poolQuiet - time.Since(p.quiet)
		if p.starting > 0 {
			wait = poolQuiet
		}
		p.mu.Unlock()
		if wait <= 0 {
			return p.r.life.Err() == nil
		}
		select {
		case <-time.After(wait):
		case <-p.r.life.Done():
			return false
		}
	}
}

// fillOne makes one like that for of.
func (p *pool) fillOne(kind poolKind, of *poolOf, like poolOf) error {
	t := p.r.templates.current(kind.template)
	if t == nil {
		return errors.New("its template is gone")
	}
	defer t.release()
	i, err := p.make(like, t)
	if err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.kinds[kind] != of { // its template was dropped or made anew meanwhile
		p.discardLocked(i)
		return nil
	}
	of.waiting = append(of.waiting, i)
	return nil
}

// make starts a clone and stops it.
func (p *pool) make(of poolOf, t *template) (*instance, error) {
	raw := make([]byte, 16)
	if _, err := rand.Read(raw); err != nil {
		return nil, fmt.Errorf("cannot draw an id: %w", err)
	}
	s := of.sandbox
	s.ID = hex.EncodeToString(raw)
	p.hide(s.ID, true)
	b := &boot{r: p.r, sandbox: s, guest: of.guest, accel: of.accel, timeout: cloneTimeout, clone: t, ahead: true}
	i, err := b.run(p.r.life)
	if err == nil {
		if err = i.getReady(p.r.life); err == nil {
			fault.At("vm from the pool", "made")
			return i, nil
		}
		err = errors.Join(err, p.undo(s.ID))
	}
	p.hide(s.ID, false)
	return nil, err
}

func (p *pool) hide(id string, on bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if on {
		p.hidden[id] = true
	} else {
		delete(p.hidden, id)
	}
}

// undo leaves nothing of one that was not handed out.
func (p *pool) undo(id string) error {
	ctx, cancel := context.WithTimeout(context.Background(), undoTimeout)
	defer cancel()
	return p.r.destroy(ctx, id, false)
}

// discardLocked has someone remove one.
func (p *pool) discardLocked(i *instance) {
	p.r.makers.Go(func() { p.discard(i.rec.ID) })
}

func (p *pool) discard(id string) {
	if err := p.undo(id); err != nil {
		p.r.cfg.Logger.Warn("cannot remove a clone that was made ahead of time", zap.String("sandbox", id), zap.Error(err))
	}
	p.hide(id, false)
}

// close removes what waits, when nobody makes any more.
func (p *pool) close() {
	p.mu.Lock()
	kinds := p.kinds
	p.kinds = map[poolKind]*poolOf{}
	p.mu.Unlock()
	for _, of := range kinds {
		for _, i := range of.waiting {
			p.discard(i.rec.ID)
		}
	}
}

// startFromPool makes a VM of a clone that waits. Nil, nil: there is none, and nothing was done.
func (r *Runtime) startFromPool(ctx context.Context, s spec.Sandbox, key templateKey) (*instance, error) {
	kind, can := r.pool.kindOf(s, key)
	if !can || r.hasLayer(s.ID) {
		return nil, nil
	}
	i := r.pool.take(kind)
	if i == nil {
		return nil, nil
	}
	defer phase.Begin(s.ID, "start: from the pool")()
	r.templates.note(key)
	waited := i.rec.ID
	named, err := i.become(ctx, s)
	if !named {
		r.pool.discard(waited)
		return nil, err
	}
	r.pool.hide(waited, false)
	if err == nil {
		return i, nil
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	return nil, errors.Join(err, r.destroy(undo, s.ID, false))
}
