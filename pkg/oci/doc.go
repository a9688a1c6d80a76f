// Package oci turns what a caller asked for and what the image says into an OCI runtime configuration: the defaults of
// docker where it has any, as tables whose rows carry their reasons. The agent applies the result; both walls get the same.
//
// It also compiles the configuration's seccomp profile into the classic BPF program that the kernel runs.
package oci
