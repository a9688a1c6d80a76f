package guest

import (
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// sizeofSockFilter is the size of struct sock_filter (linux/filter.h): u16 code, u8 jt, u8 jf, u32 k.
const sizeofSockFilter = 8

// checkFilter refuses what the kernel would refuse later, at the first process instead of at the container.
func checkFilter(filter []byte) error {
	if len(filter)%sizeofSockFilter != 0 || len(filter)/sizeofSockFilter > unix.BPF_MAXINSNS {
		return fmt.Errorf("a filter of %d bytes is no list of at most %d instructions", len(filter), unix.BPF_MAXINSNS)
	}
	return nil
}

// newFilter is a filter as seccomp(2) takes it.
func newFilter(filter []byte) (*unix.SockFprog, error) {
	if err := checkFilter(filter); err != nil {
		return nil, err
	}
	n := len(filter) / sizeofSockFilter
	instructions := make([]unix.SockFilter, n)
	copy(unsafe.Slice((*byte)(unsafe.Pointer(&instructions[0])), len(filter)), filter)
	return &unix.SockFprog{Len: uint16(n), Filter: &instructions[0]}, nil
}

// installFilter puts a seccomp filter over the calling thread for good, with SECCOMP_FILTER_FLAG_TSYNC over every thread.
func installFilter(filter []byte, flags uintptr) error {
	program, err := newFilter(filter)
	if err != nil {
		return err
	}
	thread, _, errno := unix.RawSyscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, flags, uintptr(unsafe.Pointer(program)))
	runtime.KeepAlive(program)
	if errno != 0 {
		return errno
	}
	if thread != 0 {
		return fmt.Errorf("thread %d has a filter of its own", thread)
	}
	return nil
}
