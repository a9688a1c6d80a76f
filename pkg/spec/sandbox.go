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
	// It may be asked for a snapshot: a runtime that can take some makes it so that it can be.
	Snapshots bool `json:"snapshots,omitempty"`
	// Sandboxes of different scopes never share memory, a template's included.
	TemplateScope string `json:"templateScope,omitempty"`
	// What the container's root will be like (ContainerBoot.Prepare), for a runtime that makes some ahead of time. Empty for one
	// that cannot be made before the workload is known.
	Prepare []byte `json:"-"`
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

	// MemoryBytes less the file pages that were not used lately.
	MemoryWorkingSetBytes uint64
	SwapBytes             uint64
	// What reached disks; loop devices, whose own disk counts it again, are left out.
	IOReadBytes, IOWriteBytes, IOReads, IOWrites uint64
	// Time in which the processor quota kept threads from running.
	CPUThrottled time.Duration
	// Processes the kernel killed at the cgroup's memory limit.
	OOMKills uint64
	// Nil where the host has no PSI for cgroups.
	CPUPressure, MemoryPressure, IOPressure *Pressure
}

// Pressure is the kernel's stall information (PSI) of one resource: some tasks waited for it, or all did.
type Pressure struct {
	// Percent of the last ten seconds.
	SomeAvg10, FullAvg10 float64
	SomeTotal, FullTotal time.Duration
}

// Claims are what an agent says of its sandbox: to be shown, never to be relied on.
type Claims struct {
	AgentVersion         string `json:"agentVersion,omitempty"`
	KernelRelease        string `json:"kernelRelease,omitempty"`
	BootID               string `json:"bootID,omitempty"`
	MemoryTotalBytes     uint64 `json:"-"`
	MemoryAvailableBytes uint64 `json:"-"`
	MemoryCacheBytes     uint64 `json:"-"`
	// Processes a guest's kernel killed for want of memory.
	OOMKills uint64 `json:"-"`
}
