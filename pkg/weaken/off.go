//go:build !sandboxd_weaken

// Package weaken lets a test build leave out one protection at a time, to see that the attack which it stops then
// succeeds: a test of a wall proves nothing unless it fails without the wall. Only `go build -tags sandboxd_weaken` can leave
// anything out. In every other build the functions are constant, the compiler drops what they guard, and
// TestProductionIsWhole of test/e2e/attack makes sure that nothing of it is in bin/.
package weaken

// Adopt takes the wishes of a workload's environment over, in the programs inside.
func Adopt(env []string) {}

// Without reports whether to do without a protection. A step of a table goes by its name there.
func Without(protection string) bool { return false }

// WithoutIn is Without for one process, whose own environment may name the protection too.
func WithoutIn(env []string, protection string) bool { return false }

// Environment is what a program that the daemon starts needs in order to do without the same.
func Environment() []string { return nil }

// Now is Environment for a program that can't find what the daemon's names, and lives no longer than what is left out now.
func Now() []string { return nil }
