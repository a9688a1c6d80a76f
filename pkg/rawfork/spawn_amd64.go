package rawfork

import "golang.org/x/sys/unix"

// sharedFlags: the child has the caller's memory and, for that, a stack of its own.
const sharedFlags = unix.CLONE_VM

// cloneJob is clone3(2) or clone(2); in the child, on its stack, it calls run, a function of a *job.
//
//go:noescape
func cloneJob(number, first, second uintptr, j *job, run uintptr) (pid uintptr, errno unix.Errno)
