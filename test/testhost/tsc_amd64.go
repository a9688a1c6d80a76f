package testhost

import "time"

// rdtsc reads the time stamp counter.
func rdtsc() uint64

// tscKHz measures the counter, which an emulated guest sees too. A kernel that measures it itself there can hang.
func tscKHz() uint64 {
	const window = 100 * time.Millisecond
	at, ticks := time.Now(), rdtsc()
	time.Sleep(window)
	return (rdtsc() - ticks) / uint64(time.Since(at).Microseconds()) * 1000
}
