package rawfork

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

// LastSignal is the highest signal's number.
const LastSignal = 64

const (
	sigDefault = 0              // SIG_DFL
	maskBytes  = LastSignal / 8 // sizeof(sigset_t) in the kernel
)

// byDefault and noSignals are the same for all, and nobody changes them.
var (
	byDefault = &kernelSigaction{handler: sigDefault}
	noSignals = new(uint64)
)

// ResetSignals gives every signal its default disposition and unblocks all. Handlers would go at execve by themselves, but must
// not run before; what is ignored would stay ignored, and the parent may have inherited that.
func (c *Calls) ResetSignals() {
	action := Address(c, byDefault)
	for sig := uintptr(1); sig <= LastSignal; sig++ {
		if sig != uintptr(unix.SIGKILL) && sig != uintptr(unix.SIGSTOP) {
			c.Must(fmt.Sprintf("cannot reset signal %d", sig), unix.SYS_RT_SIGACTION, sig, action, 0, maskBytes)
		}
	}
	c.Must("cannot unblock signals", unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, Address(c, noSignals), 0, maskBytes)
}
