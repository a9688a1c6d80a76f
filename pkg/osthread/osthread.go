// Package osthread runs code on operating system threads whose kernel state (cgroup, namespaces, fs ids) is changed and
// therefore must never serve another goroutine.
package osthread

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Run calls fn on a thread of its own and returns what it returned. The thread dies with fn: whatever fn changed of it
// is never seen by other code.
//
// The process's first thread is never used: it cannot die (the Go runtime parks it for ever, in whatever cgroup it had
// joined), and its namespaces are what /proc/PID shows of the process.
func Run(fn func() error) error {
	result := make(chan error, 1)
	go start(fn, result)
	return <-result
}

// start locks its goroutine to a thread. On the process's first thread it keeps that one busy while a second goroutine,
// which then cannot get it, does the work.
func start(fn func() error, result chan<- error) {
	runtime.LockOSThread() // never unlocked below: the thread ends with this goroutine
	if unix.Gettid() != os.Getpid() {
		result <- fn()
		return
	}
	inner := make(chan error, 1)
	go start(fn, inner)
	err := <-inner
	runtime.UnlockOSThread() // nothing was done to it
	result <- err
}
