package spec

import "time"

// ProtocolVersion is the version of the agent protocol (api/proto/sandboxd/agent/v1) that this build speaks.
const ProtocolVersion = 1

// Sandbox is what a runtime needs to build the walls: everything decided, nothing defaulted. It does not say what runs
// inside; that is the agent's business once the sandbox stands.
type Sandbox struct {
	// 32 hexadecimal digits, the workload's id. Every thing on the host that belongs to the sandbox bears it.
	ID string `json:"id"`
	// The image's EROFS file on the host. Read-only: a runtime opens it O_RDONLY and enforces that on the host's side.
	ImagePath string    `json:"imagePath"`
	Resources Resources `json:"resources"`
	// The sandbox has only a loopback interface unless Joins(Network). What joins it to the network is not the runtime, but
	// the runtime may have to make something to join.
	Network string `json:"network,omitempty"`
	// Where a runtime keeps what the sandbox's own kernel and its virtual machine monitor say, for pkg/console to read;
	// empty for nowhere. It is the caller's to remove.
	ConsolePath string `json:"consolePath,omitempty"`
}

// Usage is what the host counts for a sandbox: facts, from the cgroup and the host's file systems.
type Usage struct {
	Time             time.Time
	CPUTime          time.Duration
	MemoryBytes      uint64
	MemoryPeakBytes  uint64
	MemoryCacheBytes uint64
	MemoryLimitBytes uint64
	Pids             uint64
	PidsLimit        uint64
	// Blocks the writable layer occupies on the host.
	DiskBytes      uint64
	DiskLimitBytes uint64
}

// Claims are what an agent says of its sandbox: to be shown, never to be relied on.
type Claims struct {
	AgentVersion         string `json:"agentVersion,omitempty"`
	KernelRelease        string `json:"kernelRelease,omitempty"`
	BootID               string `json:"bootID,omitempty"`
	MemoryTotalBytes     uint64 `json:"-"`
	MemoryAvailableBytes uint64 `json:"-"`
	MemoryCacheBytes     uint64 `json:"-"`
}
