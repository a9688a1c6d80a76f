//go:build !amd64

package microvm

// rdtsc has nothing to read: the counter is x86's. Guests are x86-64 too, so this only keeps the package compiling.
func rdtsc() uint64 { return 0 }
