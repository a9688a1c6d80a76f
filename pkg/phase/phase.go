// Package phase tells where the time of a sandbox's life goes: `make bench-trace` has the daemon write down when each phase
// began and how long it took. Metrics are made of the same. A process has one trace or none, so this is a switch of the process,
// not a value handed through every call; while it is off, a phase costs one atomic load.
package phase

import (
	"encoding/json"
	"io"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Record is a line of a trace.
type Record struct {
	// Which sandbox.
	ID    string `json:"id"`
	Phase string `json:"phase"`
	// Nanoseconds of CLOCK_MONOTONIC, which all processes of a host share.
	Start int64 `json:"start"`
	Took  int64 `json:"took"`
}

type trace struct {
	mu sync.Mutex // one line at a time
	w  *json.Encoder
}

// sinks are who is told of phases.
type sinks struct {
	trace     *trace
	observers []func(Record)
	// Whether agents shall tell of their phases, too.
	agents bool
}

var (
	current atomic.Pointer[sinks]
	changes sync.Mutex
)

func change(fn func(*sinks)) {
	changes.Lock()
	defer changes.Unlock()
	var next sinks
	if s := current.Load(); s != nil {
		next = sinks{s.trace, slices.Clone(s.observers), s.agents}
	}
	fn(&next)
	current.Store(&next)
}

// To begins a trace. What cannot be written is lost: nothing of a sandbox may depend on it.
func To(w io.Writer) {
	change(func(s *sinks) { s.trace, s.agents = &trace{w: json.NewEncoder(w)}, true })
}

// Observe has fn called with each phase when it has ended, by whoever met it, under whatever locks: it must be quick, and wait for
// nothing. agents asks for the agents' own
// phases as well, which costs each start something.
func Observe(fn func(Record), agents bool) {
	change(func(s *sinks) { s.observers, s.agents = append(s.observers, fn), s.agents || agents })
}

// On reports whether agents shall tell of their phases.
func On() bool {
	s := current.Load()
	return s != nil && s.agents
}

// Begin notes the beginning of a phase; its result the end.
func Begin(id, name string) (end func()) {
	if current.Load() == nil {
		return func() {}
	}
	start := Now()
	return func() { Add(Record{ID: id, Phase: name, Start: start, Took: Now() - start}) }
}

// Add writes down what was measured elsewhere.
func Add(r Record) {
	s := current.Load()
	if s == nil {
		return
	}
	if t := s.trace; t != nil {
		t.mu.Lock()
		_ = t.w.Encode(r)
		t.mu.Unlock()
	}
	for _, fn := range s.observers {
		fn(r)
	}
}

// Now is the host's monotonic clock.
func Now() int64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) != nil {
		return time.Now().UnixNano() // never: every kernel has the clock
	}
	return ts.Nano()
}
