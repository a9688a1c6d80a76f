// Package phase tells where the time of a sandbox's life goes: `make bench-trace` has the daemon write down when each phase
// began and how long it took. A process writes one trace or none, so this is a switch of the process, not a value handed
// through every call; while it is off, a phase costs one atomic load.
package phase

import (
	"encoding/json"
	"io"
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

var current atomic.Pointer[trace]

// To begins a trace. What cannot be written is lost: nothing of a sandbox may depend on it.
func To(w io.Writer) { current.Store(&trace{w: json.NewEncoder(w)}) }

// On reports whether there is a trace.
func On() bool { return current.Load() != nil }

// Begin notes the beginning of a phase; its result the end.
func Begin(id, name string) (end func()) {
	t := current.Load()
	if t == nil {
		return func() {}
	}
	start := Now()
	return func() { Add(Record{ID: id, Phase: name, Start: start, Took: Now() - start}) }
}

// Add writes down what was measured elsewhere.
func Add(r Record) {
	if t := current.Load(); t != nil {
		t.mu.Lock()
		defer t.mu.Unlock()
		_ = t.w.Encode(r)
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
