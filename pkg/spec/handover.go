package spec

// A daemon hands descriptors over to the agent of a container on a connection of their own to the agent's socket: one message,
// HandoverMark and the id of the process they are for, with HandoverDescriptors descriptors (SCM_RIGHTS). It only ever goes
// this way: no descriptor comes out of a sandbox.
const (
	// HandoverMark is the first byte: a connection for calls begins with the length of a frame, at most 4 MiB in four bytes,
	// the highest first, and so with a zero.
	HandoverMark = 0xfd
	// HandoverDescriptors is how many come: the write ends of the pipes for standard output and standard error.
	HandoverDescriptors = 2
)
