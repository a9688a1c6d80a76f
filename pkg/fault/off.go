//go:build !sandboxd_fault

// Package fault names the instants at which the daemon may die: between any two steps of a workload's life that leave a
// trace on the host. A test build stops at each of them and asks its test what to do, which may kill it, or something else,
// just then. Only `go build -tags sandboxd_fault` can do that: in every other build the functions are empty, the compiler
// drops the calls, and TestProductionHasNoPoints of test/e2e/crash makes sure that nothing of it is in bin/.
package fault

// At marks an instant: place and step are constants, or the name of a step in a table. Each has a row in points.go.
func At(place, step string) {}

// Instead is the value that counts, but in a test build, which could not reach an instant otherwise, the other one.
func Instead[T any](value, inTests T) T { return value }
