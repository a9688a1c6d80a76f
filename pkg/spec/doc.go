// Package spec holds the plain values that every other package shares: what a workload is, what a sandbox is made of,
// and the kinds of error. It imports none of them.
package spec
