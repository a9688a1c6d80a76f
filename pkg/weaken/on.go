//go:build sandboxd_weaken

// Package weaken is described in off.go.
package weaken

import (
	"io"
	"os"
	"slices"
	"strings"
	"sync/atomic"
)

// Variable names the protections to do without, with commas between them: in the daemon's environment for what the daemon
// does, in a workload's for what happens inside. In the daemon's, @ and a path names a file with them, read each time.
const Variable = "SANDBOXD_WEAKEN"

// built in by -ldflags -X: for a guest's agent, of which nobody makes the environment before it is told who it is.
var built string

// listed is the file, opened before any thread of this program has another root.
var listed = func() *os.File {
	path, isFile := strings.CutPrefix(os.Getenv(Variable), "@")
	if !isFile {
		return nil
	}
	f, err := os.Open(path)
	if err != nil {
		panic(err)
	}
	return f
}()

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
func Without(protection string) bool { return slices.Contains(now(), protection) }

// now is all that is left out at the moment.
func now() []string {
	var names []string
	if own := adopted.Load(); own != nil {
		names = append(names, *own...)
	}
	list := os.Getenv(Variable)
	if listed != nil {
		b := make([]byte, 4096)
		n, err := listed.ReadAt(b, 0)
		if err != nil && err != io.EOF {
			panic(err) // a control that leaves out nothing would prove nothing
		}
		list = string(b[:n])
	}
	return append(append(names, strings.Split(built, ",")...), strings.Split(list, ",")...)
}

// Now is for a test build: see off.go.
func Now() []string { return []string{Variable + "=" + strings.Join(now(), ",")} }

// Environment is for a test build: see off.go.
func Environment() []string {
	return []string{Variable + "=" + os.Getenv(Variable)}
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
