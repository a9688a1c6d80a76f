package guest

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// tracing is set before anything is served, and constant from then on.
var tracing bool

// began is when this program's own code began to run.
var began = monotonic()

func monotonic() int64 {
	var ts unix.Timespec
	if unix.ClockGettime(unix.CLOCK_MONOTONIC, &ts) != nil {
		return 0 // never: every kernel has the clock
	}
	return ts.Nano()
}

// phase notes how long something takes, if the daemon asked for it: see spec.PhasePrefix.
func phase(name string) (end func()) {
	if !tracing {
		return func() {}
	}
	start := monotonic()
	return func() { notePhase(name, start) }
}

func notePhase(name string, start int64) {
	if tracing {
		fmt.Fprintf(os.Stderr, "%s%d %d %s\n", spec.PhasePrefix, start, monotonic()-start, name)
	}
}
