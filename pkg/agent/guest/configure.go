package guest

import (
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// Bounds of the entropy the daemon gives, as agent.proto says.
const (
	minEntropy = 32
	maxEntropy = 1024
)

func setHostname(name string) error {
	if name == "" {
		return nil
	}
	if err := unix.Sethostname([]byte(name)); err != nil {
		return fmt.Errorf("cannot set host name %q: %w", name, err)
	}
	return nil
}

// setClock sets the guest kernel's wall clock.
func setClock(now time.Time) error {
	ts := unix.NsecToTimespec(now.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("cannot set the clock: %w", err)
	}
	return nil
}

// moveClock moves the guest kernel's wall clock.
func moveClock(by time.Duration) error {
	seconds, rest := by/time.Second, by%time.Second
	if rest < 0 {
		seconds, rest = seconds-1, rest+time.Second
	}
	// Microseconds: asking for nanoseconds changes what adjtimex(2) tells everybody later.
	move := unix.Timex{Modes: unix.ADJ_SETOFFSET, Time: unix.Timeval{Sec: int64(seconds), Usec: rest.Microseconds()}}
	if _, err := unix.Adjtimex(&move); err != nil {
		return fmt.Errorf("cannot move the clock: %w", err)
	}
	return nil
}

// addEntropy gives the guest kernel's random generator bytes that only this guest has, and has it use them from its next
// draw on. Without the second request two clones of one memory image drew the same numbers.
func addEntropy(device *os.File, bytes []byte) error {
	if weaken.Without("reseed") {
		return nil
	}
	// struct rand_pool_info (linux/random.h).
	pool := struct {
		bits, size int32
		data       [maxEntropy]byte
	}{bits: int32(len(bytes)) * 8, size: int32(len(bytes))}
	copy(pool.data[:], bytes)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&pool))); errno != 0 {
		return fmt.Errorf("cannot add entropy: %w", errno)
	}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, device.Fd(), unix.RNDRESEEDCRNG, 0); errno != 0 {
		return fmt.Errorf("cannot reseed the random generator: %w", errno)
	}
	return nil
}
