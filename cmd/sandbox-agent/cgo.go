//go:build cgo

package main

import (
	"fmt"
	"os"
)

// With cgo Go cannot change all threads' capabilities at once (syscall.AllThreadsSyscall), and the agent's confinement of
// itself would fail at a container's start, with a message that leads nowhere.
func init() {
	fmt.Fprintln(os.Stderr, "sandbox-agent: built with cgo, which cannot confine itself: build it with CGO_ENABLED=0 (make build does)")
	os.Exit(2)
}
