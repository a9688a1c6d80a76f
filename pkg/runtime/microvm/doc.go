// Package microvm builds the virtual machine wall: QEMU's microvm machine with a guest kernel of its own, in which
// sandbox-agent is PID 1.
package microvm
