package spec

// What an agent is told at its birth, before it can be called. Both forms are JSON.

// ContainerBoot is the one message a container's agent reads from its boot socket (descriptor 3, SOCK_SEQPACKET). With
// it come descriptors by SCM_RIGHTS, in this order: the detached root mount, the listening Unix stream socket the
// agent serves on. The agent answers with a BootResult, closes the socket and serves. It attaches the root only when
// CreateContainer, by itself or in a Launch, says how.
//
// With Prepare it attaches the root at once, answers, and waits for a second message, which has no descriptors; that one it
// answers as above.
type ContainerBoot struct {
	Version int `json:"version"` // ProtocolVersion
	// Trace has the agent write its phases to standard error, a PhasePrefix before each, for measuring.
	Trace bool `json:"trace,omitempty"`
	// An agentv1.Launch that the agent is to do before it answers; empty for none.
	Launch []byte `json:"launch,omitempty"`
	// An OCI runtime-spec config without a process, a host name and annotations: what the root will be like, whoever gets it.
	// Empty for none. The config of the container that comes must say the same (PreparedFor).
	Prepare []byte `json:"prepare,omitempty"`
}

// MaxLaunchBytes bounds a Launch, and what is answered to it: in base64 either fits into a message of a Unix socket, with room
// to spare.
const MaxLaunchBytes = 64 << 10

// PhasePrefix begins a line of an agent that traces: then come, parted by blanks, when the phase began and how long it took
// (nanoseconds, the start of CLOCK_MONOTONIC), and its name.
const PhasePrefix = "phase "

// BootResult is the agent's answer on the boot socket.
type BootResult struct {
	// Empty on success.
	Error string `json:"error,omitempty"`
	// An agentv1.LaunchResult, if there was a Launch. By then the workload's process runs: a claim.
	Launched []byte `json:"launched,omitempty"`
}

// VMBoot is the file /boot.json of a guest's initramfs, mode 0400, made anew for each boot.
type VMBoot struct {
	Version int `json:"version"` // ProtocolVersion
	// Hexadecimal, TokenLen bytes; empty for a guest that is to become a template, and is adopted later.
	Token string `json:"token,omitempty"`
	// Kernel modules to load before anything else, in order: absolute paths in the initramfs.
	Modules []string `json:"modules,omitempty"`
	// Files of the initramfs that this guest does not need: they are memory of its.
	Unused []string `json:"unused,omitempty"`
	// The host's vsock port to dial (CID 2), or else
	VsockPort uint32 `json:"vsockPort,omitempty"`
	// the name of the virtio-serial port by which the agent reaches the daemon: see channel.go.
	Port string `json:"port,omitempty"`
	// Block devices, by virtio-blk serial number (/sys/block/*/serial): the EROFS image, read-only, and the ext4 writable
	// layer that has the directories upper and work.
	ImageSerial string `json:"imageSerial"`
	DiskSerial  string `json:"diskSerial"`
}
