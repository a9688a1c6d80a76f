//go:build sandboxd_weaken

// Package weaken is described in off.go.
package weaken

import (
	"os"
	"slices"
	"strings"
	"sync/atomic"
)

// Variable names the protections to do without, with commas between them: in the daemon's environment for what the daemon
// does, in a workload's for what happens inside.
const Variable = "SANDBOXD_WEAKEN"

// built in by -ldflags -X: for a guest's agent, of which nobody makes the environment before it is told who it is.
var built string

var adopted atomic.Pointer[[]string]

// Adopt is for a test build: see off.go.
func Adopt(env []string) {
	for _, e := range env {
		if list, ok := strings.CutPrefix(e, Variable+"="); ok {
			names := strings.Split(list, ",")
			adopted.Store(&names)
		}
	}
}

// Without is for a test build: see off.go.
func Without(protection string) bool {
	if names := adopted.Load(); names != nil && slices.Contains(*names, protection) {
		return true
	}
	return slices.Contains(strings.Split(built, ","), protection) || slices.Contains(strings.Split(os.Getenv(Variable), ","), protection)
}

// WithoutIn is for a test build: see off.go.
func WithoutIn(env []string, protection string) bool {
	for _, e := range env {
		if list, ok := strings.CutPrefix(e, Variable+"="); ok && slices.Contains(strings.Split(list, ","), protection) {
			return true
		}
	}
	return Without(protection)
}
