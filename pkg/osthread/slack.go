package osthread

import (
	"fmt"
	"os"
	"strconv"
)

// DefaultTimerSlack is the kernel's, in nanoseconds (prctl(2), PR_SET_TIMERSLACK).
const DefaultTimerSlack = 50_000

// SetTimerSlack lets the kernel run timers of this process late by up to that many nanoseconds: of all its threads, and of those they
// start. While a Go program has something to do, one thread of its runtime sleeps 20 µs at a time (sysmon), which with the
// kernel's default of 50 µs takes the processor from others every 70 µs.
func SetTimerSlack(nanoseconds uint64) error {
	threads, err := os.ReadDir("/proc/self/task")
	if err != nil {
		return fmt.Errorf("cannot set the timer slack: %w", err)
	}
	for _, t := range threads {
		// By the thread's own name: below task there is no such file.
		f, err := os.OpenFile("/proc/"+t.Name()+"/timerslack_ns", os.O_WRONLY, 0)
		if os.IsNotExist(err) {
			continue // the thread has ended, or the kernel has no such file: it is an optimisation
		}
		if err != nil {
			return fmt.Errorf("cannot set the timer slack: %w", err)
		}
		_, err = f.WriteString(strconv.FormatUint(nanoseconds, 10))
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			return fmt.Errorf("cannot set the timer slack: %w", err)
		}
	}
	return nil
}
