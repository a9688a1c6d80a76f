package image

import (
	"sync"
	"time"
)

// Phases of a pull.
const (
	PhaseResolve = "resolve"
	PhaseFetch   = "fetch"
	PhaseBuild   = "build"
)

// Progress is how far a pull has come.
type Progress struct {
	// PhaseResolve, PhaseFetch or PhaseBuild.
	Phase string
	// Digest of the layer being fetched.
	Layer string
	// Bytes; Total is 0 when not known.
	Done, Total int64
}

// reportEvery is how often one layer's progress is worth telling.
const reportEvery = 100 * time.Millisecond

// reporter passes on progress, one call at a time and not too often: the first and the last of each phase and layer, and
// in between what is new after reportEvery.
type reporter struct {
	fn   func(Progress)
	mu   sync.Mutex
	last map[string]time.Time
}

func newReporter(fn func(Progress)) *reporter {
	return &reporter{fn: fn, last: map[string]time.Time{}}
}

func (r *reporter) report(p Progress) {
	if r.fn == nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	key := p.Phase + p.Layer
	now := time.Now()
	if last, seen := r.last[key]; seen && p.Done != p.Total && now.Sub(last) < reportEvery {
		return
	}
	r.last[key] = now
	r.fn(p)
}
