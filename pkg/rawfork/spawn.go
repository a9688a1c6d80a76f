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

// Child is a child that may share this process's memory until it executes its program.
type Child struct {
	PID int
	// Of Spawn: pollable and close-on-exec; the caller's.
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

func (c *Calls) job(status uintptr, flags uint64, cgroup *os.File) *job {
	j := &job{list: c.list, status: status, calls: c, clone: cloneArgs{flags: flags, exitSignal: uint64(unix.SIGCHLD)}}
	if cgroup != nil {
		j.clone.flags |= unix.CLONE_INTO_CGROUP
		j.clone.cgroup = uint64(cgroup.Fd())
	}
	if flags&unix.CLONE_VM != 0 {
		j.clone.stack, j.clone.stackSize = uint64(uintptr(unsafe.Pointer(&j.stack))), childStack
	}
	return j
}

// Fork forks a child, in the cgroup of the unified hierarchy if there is one, that makes the calls and reports to status. It does not
// wait for any of them. Who stops the child stops nothing else: it is no vfork.
//
// With share, and where this package has the instructions for it, the child has the caller's memory instead of a copy (CLONE_VM): copying
// page tables, and then every page that is written, takes longer than all the rest. Whoever may trace the child has the caller's memory
// then; that memory decides who may (ptrace_may_access), so the calls must not change its mind: with fs.suid_dumpable=1 a change
// of the user or the group makes it dumpable. An OOM killer that picks the child ends both; it finds the caller as large.
//
// Hold keeps what the child reads: call it when the status pipe is closed at the child's end, by which the child has executed
// its program or ended.
func (c *Calls) Fork(cgroup *os.File, status uintptr, share bool) (*Child, error) {
	flags := uint64(0)
	if share {
		flags = sharedFlags
	}
	j := c.job(status, flags, cgroup)
	call := cloneCall{unix.SYS_CLONE3, uintptr(unsafe.Pointer(&j.clone)), unsafe.Sizeof(j.clone)}
	if cgroup == nil {
		// Whose flags a filter can see.
		call = cloneCall{unix.SYS_CLONE, uintptr(j.clone.flags | j.clone.exitSignal), uintptr(j.clone.stack + j.clone.stackSize)}
	}
	pid, errno := forkJob(j, call)
	runtime.KeepAlive(cgroup)
	if errno != 0 {
		return nil, os.NewSyscallError("clone", errno)
	}
	return &Child{PID: int(pid), job: j}, nil
}

// Spawn is Fork into new namespaces (CLONE_NEW… flags) with the caller's memory, and has the child's PIDFD.
func (c *Calls) Spawn(flags uint64, cgroup *os.File, status uintptr) (*Child, error) {
	j := c.job(status, flags|unix.CLONE_PIDFD|sharedFlags, cgroup)
	pidfd := new(int32)
	j.clone.pidfd = uint64(Address(c, pidfd))
	pid, errno := forkJob(j, cloneCall{unix.SYS_CLONE3, uintptr(unsafe.Pointer(&j.clone)), unsafe.Sizeof(j.clone)})
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

// cloneCall is clone3(2) with its struct and that one's size, or clone(2) with flags and the top of the child's stack, which on the
// architectures that Go runs on come first, 0 for the caller's own address.
type cloneCall struct{ number, first, second uintptr }

// forkJob forks the child, which never returns from it.
//
//go:norace
//go:noinline
func forkJob(j *job, call cloneCall) (uintptr, unix.Errno) {
	run := runJob
	entry := **(**uintptr)(unsafe.Pointer(&run)) // a function value points to where its code's address is
	beforeFork()
	pid, errno := cloneJob(call.number, call.first, call.second, j, entry)
	afterFork()
	return pid, errno
}

// runJob is the child's life, wherever its stack is.
//
//go:norace
//go:nosplit
func runJob(j *job) { runChild(j.list, j.status, &j.report) }
