package microvm

import "time"

// tscWindow is how long the host's time stamp counter is watched at least: reading the clock costs 100 ns at most, so the
// frequency is right to a few parts in a million.
const tscWindow = 50 * time.Millisecond

// tscSample is the counter at a time.
type tscSample struct {
	at    time.Time
	ticks uint64
}

// sampleTSC reads clock and counter together: of a few tries the one that was interrupted least.
func sampleTSC() tscSample {
	var best tscSample
	spread := time.Duration(1<<63 - 1)
	for range 5 {
		before := time.Now()
		ticks := rdtsc()
		if d := time.Since(before); d < spread {
			spread, best = d, tscSample{at: before.Add(d / 2), ticks: ticks}
		}
	}
	return best
}

// kHz is the counter's frequency since the sample was taken; 0 where there is no counter. It sleeps what is missing to
// tscWindow, once in the life of a daemon.
func (s tscSample) kHz() uint64 {
	time.Sleep(tscWindow - time.Since(s.at))
	now := sampleTSC()
	if now.ticks <= s.ticks {
		return 0
	}
	return uint64(float64(now.ticks-s.ticks) / float64(now.at.Sub(s.at).Microseconds()) * 1000)
}
