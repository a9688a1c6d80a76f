// Package rawfork forks children that make a prepared list of system calls and execute a program. A fork of a program with
// threads, as every Go program is, leaves the child no other safe thing to do; and each call's failure is told by its number.
package rawfork

import (
	"encoding/binary"
	"fmt"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Calls are what a forked child does between fork and execve: system calls in a straight line, prepared beforehand. In a
// child of a program with threads nothing else is safe: it has one thread, and whatever lock another held at the fork is
// held for ever, the memory allocator's included.
type Calls struct {
	list []Call
	// What the arguments point to. The collector does not see them as pointers.
	keep []any
}

// Call is one of them.
type Call struct {
	kind   callKind
	number uintptr
	args   [6]uintptr
	// For who reads the report: the step it belongs to, and on what it works where the step's name does not say.
	Step int
	What string
	// A failure that is none; 0 for none.
	Pass unix.Errno
	// Of mustEqual.
	word       *uint64
	mask, want uint64
}

type callKind uint8

const (
	// mustSucceed: any failure but pass ends the child with a report.
	mustSucceed callKind = iota
	// mustOpen is mustSucceed, and its result becomes the first argument of each mustUse after it.
	mustOpen
	mustUse
	// mustEqual is no system call: word, masked, must be want.
	mustEqual
	// tryExecute goes on to the next call if there is no such file, or one that may not be executed.
	tryExecute
)

// AtCwd has a path be looked up from the child's working directory.
const AtCwd = ^uintptr(-unix.AT_FDCWD - 1)

// ReportBytes is the size of a report: what a child that failed writes to its status pipe, the number of the call and of the error,
// each 4 bytes in the machine's order. It is below PIPE_BUF: a report comes whole.
//
// failedCode is what it exits with then.
const (
	ReportBytes = 8
	failedCode  = 1
)

// Must adds a system call that has to succeed.
func (c *Calls) Must(what string, number uintptr, args ...uintptr) *Call {
	return c.add(mustSucceed, what, number, args...)
}

// Open is Must, and its result becomes the first argument of each Use after it.
func (c *Calls) Open(what string, number uintptr, args ...uintptr) *Call {
	return c.add(mustOpen, what, number, args...)
}

// Use is Must with the result of the last Open for its first argument.
func (c *Calls) Use(what string, number uintptr, args ...uintptr) *Call {
	return c.add(mustUse, what, number, args...)
}

// Execute adds an execve. If there is no such file, or one that may not be executed, the next call is made.
func (c *Calls) Execute(what string, number uintptr, args ...uintptr) *Call {
	return c.add(tryExecute, what, number, args...)
}

// Len is how many calls there are.
func (c *Calls) Len() int { return len(c.list) }

// Mark says to which step the calls after the first from belong.
func (c *Calls) Mark(from, step int) {
	for i := from; i < len(c.list); i++ {
		c.list[i].Step = step
	}
}

// Compares reports whether it is one that Equal added.
func (c *Call) Compares() bool { return c.kind == mustEqual }

func (c *Calls) add(kind callKind, what string, number uintptr, args ...uintptr) *Call {
	call := Call{kind: kind, number: number, What: what}
	copy(call.args[:], args)
	c.list = append(c.list, call)
	return &c.list[len(c.list)-1]
}

// Equal adds a look at a word in memory that an earlier call filled.
func (c *Calls) Equal(what string, word *uint64, mask, want uint64) {
	call := c.add(mustEqual, what, 0)
	call.word, call.mask, call.want = word, mask, want
}

// Address of what p points to, kept alive as long as c is. p comes from the heap: the calls run on this goroutine's stack, and
// that does not move between here and the fork only because p is not on it.
func Address[T any](c *Calls, p *T) uintptr {
	c.keep = append(c.keep, p)
	return uintptr(unsafe.Pointer(p))
}

// Text is the address of a NUL-terminated string.
func (c *Calls) Text(s string) (uintptr, error) {
	p, err := unix.BytePtrFromString(s)
	if err != nil {
		return 0, err
	}
	return Address(c, p), nil
}

// cloneArgs is struct clone_args (linux/sched.h).
type cloneArgs struct {
	flags            uint64
	pidfd            uint64    // address of an int
	_                [2]uint64 // child_tid, parent_tid
	exitSignal       uint64
	stack, stackSize uint64
	_                [3]uint64 // tls, set_tid, set_tid_size
	cgroup           uint64
}

// The runtime's own preparations for a fork: signals are blocked, so that no handler runs in the child, and a function that
// would grow the stack ends the program.
//
//go:linkname beforeFork syscall.runtime_BeforeFork
func beforeFork()

//go:linkname afterFork syscall.runtime_AfterFork
func afterFork()

// runChild makes the calls. It ends the process unless one of them executes a program. The child must not allocate, grow the stack or
// call anything that may: hence nosplit all the way down, and norace.
//
//go:norace
//go:nosplit
func runChild(list []Call, status uintptr, report *[ReportBytes]byte) {
	var opened uintptr
	var errno syscall.Errno
	failed := -1
	for i := range list {
		call := &list[i]
		if call.kind == mustEqual {
			if *call.word&call.mask != call.want {
				failed, errno = i, 0
				break
			}
			continue
		}
		first := call.args[0]
		if call.kind == mustUse {
			first = opened
		}
		result, _, e := syscall.RawSyscall6(call.number, first, call.args[1], call.args[2], call.args[3], call.args[4], call.args[5])
		if e == 0 || e == call.Pass {
			if call.kind == mustOpen {
				opened = result
			}
			continue
		}
		if call.kind == tryExecute {
			if failed < 0 || e != syscall.ENOENT && e != syscall.ENOTDIR {
				failed, errno = i, e
			}
			// As execvp(3) does: a later directory may have it.
			if e == syscall.ENOENT || e == syscall.ENOTDIR || e == syscall.EACCES {
				continue
			}
			break
		}
		failed, errno = i, e
		break
	}
	*(*int32)(unsafe.Pointer(&report[0])) = int32(failed)
	*(*int32)(unsafe.Pointer(&report[4])) = int32(errno)
	syscall.RawSyscall6(syscall.SYS_WRITE, status, uintptr(unsafe.Pointer(report)), ReportBytes, 0, 0, 0)
	for {
		syscall.RawSyscall6(syscall.SYS_EXIT_GROUP, failedCode, 0, 0, 0, 0, 0)
	}
}

// Failed reads a child's report. A child writes it before it executes another program.
func (c *Calls) Failed(report []byte) (*Call, unix.Errno, error) {
	if len(report) != ReportBytes {
		return nil, 0, fmt.Errorf("a report of %d bytes", len(report))
	}
	i := int(int32(binary.NativeEndian.Uint32(report)))
	if i < 0 || i >= len(c.list) {
		return nil, 0, fmt.Errorf("a report of call %d", i)
	}
	return &c.list[i], unix.Errno(binary.NativeEndian.Uint32(report[4:])), nil
}
