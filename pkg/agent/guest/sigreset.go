package guest

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// kernelSigaction is struct sigaction as rt_sigaction(2) takes it on architectures with SA_RESTORER (amd64, arm64).
type kernelSigaction struct {
	handler, flags, restorer uintptr
	mask                     uint64
}

const (
	sigDefault = 0 // SIG_DFL
	sigIgnore  = 1 // SIG_IGN
	lastSignal = 64
	maskBytes  = lastSignal / 8 // sizeof(sigset_t) in the kernel
)

// resetSignals gives every ignored signal its default disposition and unblocks all. Handlers go at execve by themselves,
// but what is ignored stays ignored, and the agent may have inherited that from whoever started the daemon.
func resetSignals() error {
	for sig := uintptr(1); sig <= lastSignal; sig++ {
		if sig == uintptr(unix.SIGKILL) || sig == uintptr(unix.SIGSTOP) {
			continue
		}
		var old kernelSigaction
		if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, 0, uintptr(unsafe.Pointer(&old)), maskBytes, 0, 0); errno != 0 {
			return fmt.Errorf("cannot read the disposition of signal %d: %w", sig, errno)
		}
		if old.handler != sigIgnore {
			continue
		}
		byDefault := kernelSigaction{handler: sigDefault}
		if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, sig, uintptr(unsafe.Pointer(&byDefault)), 0, maskBytes, 0, 0); errno != 0 {
			return fmt.Errorf("cannot reset signal %d: %w", sig, errno)
		}
	}
	var none uint64
	if _, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGPROCMASK, unix.SIG_SETMASK, uintptr(unsafe.Pointer(&none)), 0, maskBytes, 0, 0); errno != 0 {
		return fmt.Errorf("cannot unblock signals: %w", errno)
	}
	return nil
}
