package rawfork

import (
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// childStack is more than a child's calls need: nothing of it grows a stack, and the linker bounds what such functions use
// (800 bytes).
const childStack = 8 << 10

// Child is a child that shares this process's memory until it executes its program.
type Child struct {
	PID int
	// Pollable and close-on-exec; the caller's.
	PIDFD *os.File

	job *job
}

// job is what a child works with. It is on the heap, where nothing moves, and must be alive until the child has its own memory.
type job struct {
	list   []Call
	status uintptr
	report [ReportBytes]byte
	stack  [childStack]byte
	clone  cloneArgs
	calls  *Calls
}

// Spawn forks a child in new namespaces (CLONE_NEW… flags), in the cgroup of the unified hierarchy if there is one, that makes
// the calls and reports to status. It does not wait for any of them. Where this package has the instructions for it the child
// shares the caller's memory instead of getting a copy (CLONE_VM, but not CLONE_VFORK): copying page tables, and then every page
// that is written, takes longer than making the namespaces. Whoever could trace or stop such a child could do as much to this process.
//
// Hold keeps what the child reads: call it when the status pipe is closed at the child's end, by which the child has executed
// its program or ended.
func (c *Calls) Spawn(flags uint64, cgroup *os.File, status uintptr) (*Child, error) {
	pidfd := new(int32)
	j := &job{list: c.list, status: status, calls: c, clone: cloneArgs{
		flags: flags | unix.CLONE_PIDFD | sharedFlags, pidfd: uint64(Address(c, pidfd)), exitSignal: uint64(unix.SIGCHLD),
	}}
	if cgroup != nil {
		j.clone.flags |= unix.CLONE_INTO_CGROUP
		j.clone.cgroup = uint64(cgroup.Fd())
	}
	if sharedFlags != 0 {
		j.clone.stack, j.clone.stackSize = uint64(uintptr(unsafe.Pointer(&j.stack))), childStack
	}
	pid, errno := forkJob(j)
	runtime.KeepAlive(cgroup)
	if errno != 0 {
		return nil, os.NewSyscallError("clone3", errno)
	}
	child := &Child{PID: int(pid), job: j}
	if err := unix.SetNonblock(int(*pidfd), true); err != nil { // lets the Go runtime's poller wait for it
		_ = unix.Kill(child.PID, unix.SIGKILL) // our child, not reaped: the number is its own
		_, _ = unix.Wait4(child.PID, nil, 0, nil)
		_ = unix.Close(int(*pidfd))
		return nil, err
	}
	child.PIDFD = os.NewFile(uintptr(*pidfd), "pidfd")
	return child, nil
}

// Hold keeps the child's calls, and what they point to, in memory up to here.
func (c *Child) Hold() { runtime.KeepAlive(c.job) }

// forkJob forks the child, which never returns from it.
//
//go:norace
//go:noinline
func forkJob(j *job) (uintptr, unix.Errno) {
	run := runJob
	entry := **(**uintptr)(unsafe.Pointer(&run)) // a function value points to where its code's address is
	beforeFork()
	pid, errno := cloneJob(&j.clone, unsafe.Sizeof(j.clone), j, entry)
	afterFork()
	return pid, errno
}

// runJob is the child's life, wherever its stack is.
//
//go:norace
//go:nosplit
func runJob(j *job) { runChild(j.list, j.status, &j.report) }
