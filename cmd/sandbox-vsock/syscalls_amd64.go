package main

import "golang.org/x/sys/unix"

const arch = unix.AUDIT_ARCH_X86_64

var archSyscalls = []rule{
	{unix.SYS_EPOLL_WAIT, nil, "the loop"},
	{unix.SYS_POLL, nil, "whether the daemon has hung up"},
}
