package main

import (
	"fmt"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// confine gives up what this process doesn't need. Who starts it has dropped user, capabilities and network already.
//
//	no_new_privs      nothing it could exec would have more rights; also what lets it set a filter
//	not dumpable      no core of guest memory, no ptrace by its own user: QEMUs of other VMs may have that one
//	no core           the same by limit
//	Go's poller       made while its system calls are still allowed: the runtime makes it at its first timer, which may be
//	                  the one by which it gives memory back, hours later, and ends the program if it can't
//	seccomp           the system calls in the table of syscalls.go, on every thread
func confine() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot set no_new_privs: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot become undumpable: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("cannot forbid core files: %w", err)
	}
	time.Sleep(time.Nanosecond) // makes the poller
	return filter()
}

// filter sets the seccomp filter. What it doesn't allow fails with EPERM: as much denied as by a kill, and Go's runtime
// can do without what it doesn't get.
func filter() error {
	program := compile(syscalls)
	prog := unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]}
	_, _, errno := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC,
		uintptr(unsafe.Pointer(&prog)))
	if errno != 0 {
		return fmt.Errorf("cannot set the seccomp filter: %w", errno)
	}
	return nil
}

// Offsets in struct seccomp_data.
const (
	dataNR   = 0
	dataArch = 4
	dataArg0 = 16 // low half, little-endian; the next argument is 8 further
)

// compile makes a filter of a table of rules.
func compile(rules []rule) []unix.SockFilter {
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	jump := func(op uint16, k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | op | unix.BPF_K, K: k, Jt: yes, Jf: no}
	}
	ret := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k} }
	const deny = unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)

	program := []unix.SockFilter{
		load(dataArch),
		jump(unix.BPF_JEQ, arch, 1, 0),
		ret(unix.SECCOMP_RET_KILL_PROCESS), // a foreign call convention is an attack
		load(dataNR),
	}
	for _, r := range rules {
		if r.check == nil {
			program = append(program, jump(unix.BPF_JEQ, r.nr, 0, 1), ret(unix.SECCOMP_RET_ALLOW))
			continue
		}
		// Of the argument: every bit of must, none of mustNot.
		program = append(program,
			jump(unix.BPF_JEQ, r.nr, 0, 6),
			load(dataArg0+8*r.check.arg),
			jump(unix.BPF_JSET, r.check.mustNot, 3, 0),
			unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: r.check.must},
			jump(unix.BPF_JEQ, r.check.must, 0, 1),
			ret(unix.SECCOMP_RET_ALLOW),
			ret(deny),
		)
	}
	return append(program, ret(deny))
}
