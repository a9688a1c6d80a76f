//go:build !amd64

package rawfork

import (
	"syscall"

	"golang.org/x/sys/unix"
)

// sharedFlags: none, the child has a copy of the caller's memory.
const sharedFlags = 0

// cloneJob is clone3(2) or clone(2); in the child it calls runJob.
//
//go:norace
//go:nosplit
func cloneJob(number, first, second uintptr, j *job, _ uintptr) (uintptr, unix.Errno) {
	pid, _, errno := syscall.RawSyscall6(number, first, second, 0, 0, 0, 0)
	if errno == 0 && pid == 0 {
		runJob(j)
	}
	return pid, errno
}
