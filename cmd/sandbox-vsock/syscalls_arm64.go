package main

import "golang.org/x/sys/unix"

const arch = unix.AUDIT_ARCH_AARCH64

var archSyscalls = []rule{
	{unix.SYS_PPOLL, nil, "whether the daemon has hung up"},
}
