package guest

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// kernelSigaction is struct sigaction as rt_sigaction(2) takes it on architectures with SA_RESTORER (amd64, arm64).
type kernelSigaction struct {
	handler uintptr
	_       [2]uintptr // flags, restorer
	_       uint64     // mask
}

const (
	sigDefault = 0 // SIG_DFL
	lastSignal = 64
	maskBytes  = lastSignal / 8 // sizeof(sigset_t) in the kernel
)

// byDefault and noSignals are the same for all, and nobody changes them.
var (
	byDefault = &kernelSigaction{handler: sigDefault}
	noSignals = new(uint64)
)

// resetSignals gives every signal its default disposition and unblocks all. Handlers would go at execve by themselves, but must
// not run before; what is ignored would stay ignored, and the agent may have inherited that from whoever started the daemon.
func resetSignals(calls *childCalls) {
	action := address(calls, byDefault)
	for sig := uintptr(1); sig <= lastSignal; sig++ {
		if sig != uintptr(unix.SIGKILL) && sig != uintptr(unix.SIGSTOP) {
			calls.must(fmt.Sprintf("cannot reset signal %d", sig), unix.SYS_RT_SIGACTION, sig, action, 0, maskBytes)
		}
	}
	calls.must("cannot unblock signals", unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, address(calls, noSignals), 0, maskBytes)
}
