package microvm

// rdtsc reads the time stamp counter. Under TCG the guest's is the host's.
func rdtsc() uint64
