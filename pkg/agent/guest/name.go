package guest

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// NameProcess sets what /proc/PID/comm says, at most 15 bytes of it. It must be called on the main thread.
func NameProcess(name string) error {
	b, err := unix.BytePtrFromString(name)
	if err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_SET_NAME, uintptr(unsafe.Pointer(b)), 0, 0, 0); err != nil {
		return fmt.Errorf("cannot name the process: %w", err)
	}
	return nil
}
