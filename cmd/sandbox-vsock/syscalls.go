package main

import "golang.org/x/sys/unix"

// rule allows a system call.
type rule struct {
	nr    uint32
	check *check
	why   string
}

// check is a condition on the low half of an argument.
type check struct {
	arg, must, mustNot uint32
}

var syscalls = append([]rule{
	{unix.SYS_READ, nil, "vhost-user, and what Go's os package does to an eventfd"},
	{unix.SYS_WRITE, nil, "interrupts to the guest; the one line on descriptor 2"},
	{unix.SYS_READV, nil, "the daemon's bytes into guest memory"},
	{unix.SYS_WRITEV, nil, "the guest's bytes to the daemon"},
	{unix.SYS_RECVMSG, nil, "vhost-user messages with descriptors"},
	{unix.SYS_SENDMSG, nil, "answers to them"},
	{unix.SYS_ACCEPT4, nil, "the daemon's connections"},
	{unix.SYS_SHUTDOWN, nil, "half-close"},
	{unix.SYS_CLOSE, nil, "connections and QEMU's descriptors"},
	{unix.SYS_FCNTL, nil, "non-blocking descriptors"},
	{unix.SYS_FSTAT, nil, "how large guest memory is"},
	{unix.SYS_EPOLL_CREATE1, nil, "the loop"},
	{unix.SYS_EPOLL_CTL, nil, "the loop"},
	{unix.SYS_EPOLL_PWAIT, nil, "the loop; Go's poller"},
	{unix.SYS_MMAP, &check{arg: 2, mustNot: unix.PROT_EXEC}, "guest memory; Go's heap and stacks"},
	{unix.SYS_MUNMAP, nil, "guest memory; Go's heap"},
	{unix.SYS_MADVISE, nil, "Go's heap"},
	{unix.SYS_FUTEX, nil, "Go's threads"},
	{unix.SYS_CLONE, &check{arg: 0, must: unix.CLONE_THREAD}, "Go's threads; never a process"},
	{unix.SYS_SCHED_YIELD, nil, "Go's threads"},
	{unix.SYS_NANOSLEEP, nil, "Go's threads"},
	{unix.SYS_GETTID, nil, "Go's threads"},
	{unix.SYS_GETPID, nil, "Go's preemption"},
	{unix.SYS_TGKILL, nil, "Go's preemption"},
	{unix.SYS_RT_SIGACTION, nil, "Go's signal handlers"},
	{unix.SYS_RT_SIGPROCMASK, nil, "Go's threads"},
	{unix.SYS_RT_SIGRETURN, nil, "Go's preemption"},
	{unix.SYS_SIGALTSTACK, nil, "Go's threads"},
	{unix.SYS_CLOCK_GETTIME, nil, "deadlines, where the vDSO has to ask"},
	{unix.SYS_RESTART_SYSCALL, nil, "the kernel's own, after a stop"},
	{unix.SYS_EXIT, nil, "Go's threads"},
	{unix.SYS_EXIT_GROUP, nil, "the end"},
}, archSyscalls...)
