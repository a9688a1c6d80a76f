package spec

import "time"

// Isolation is the kind of wall around a workload. The empty value is invalid: forgetting to decide must never mean
// sharing the kernel.
type Isolation string

const (
	// IsolationAuto asks for exactly what the policy demands. It is never the isolation of a sandbox.
	IsolationAuto      Isolation = "auto"
	IsolationContainer Isolation = "container"
	IsolationVM        Isolation = "vm"
)

// Weaker reports whether i promises less than o. Only container and vm compare; container is weaker than vm.
func (i Isolation) Weaker(o Isolation) bool {
	return i == IsolationContainer && o == IsolationVM
}

// Workload is what a caller asks for.
type Workload struct {
	Image     string    `json:"image"`
	Isolation Isolation `json:"isolation"`
	// Process as asked: what is empty comes from the image's configuration.
	Process      Process   `json:"process"`
	Resources    Resources `json:"resources"`
	Hostname     string    `json:"hostname,omitempty"`
	Mounts       []Mount   `json:"mounts,omitempty"`
	Network      string    `json:"network,omitempty"`
	ReadOnlyRoot bool      `json:"readOnlyRoot,omitempty"`
	// It is to be possible to take snapshots of it: a VM's.
	Snapshots bool `json:"snapshots,omitempty"`
	// Canonical names: CAP_NET_ADMIN, or ALL.
	CapAdd     []string `json:"capAdd,omitempty"`
	CapDrop    []string `json:"capDrop,omitempty"`
	StopSignal string   `json:"stopSignal,omitempty"`
	Seccomp    Seccomp  `json:"seccomp,omitzero"`
}

// Seccomp is which filter of system calls is asked for. The zero value is the default profile.
type Seccomp struct {
	// No filter.
	Unconfined bool `json:"unconfined,omitempty"`
	// A profile as JSON, docker's format or the OCI runtime-spec's.
	Profile string `json:"profile,omitempty"`
}

// IsDefault reports whether nothing but the default profile is asked for.
func (s Seccomp) IsDefault() bool { return s == Seccomp{} }

// Process is a process to run: the workload's own, or one exec'd into it.
type Process struct {
	Entrypoint []string `json:"entrypoint,omitempty"`
	Command    []string `json:"command,omitempty"`
	// NAME=value
	Env []string `json:"env,omitempty"`
	// NAME|UID[:GROUP|GID], resolved by the agent in the image's own files.
	User         string       `json:"user,omitempty"`
	WorkingDir   string       `json:"workingDir,omitempty"`
	Terminal     bool         `json:"terminal,omitempty"`
	TerminalSize TerminalSize `json:"terminalSize,omitzero"`
	Stdin        bool         `json:"stdin,omitempty"`
	Rlimits      []Rlimit     `json:"rlimits,omitempty"`
}

// TerminalSize is in character cells; the zero value leaves the kernel's default.
type TerminalSize struct {
	Rows    uint16 `json:"rows,omitempty"`
	Columns uint16 `json:"columns,omitempty"`
}

// Rlimit is one resource limit of a process. Type is canonical: RLIMIT_NOFILE.
type Rlimit struct {
	Type string `json:"type"`
	Soft uint64 `json:"soft"`
	Hard uint64 `json:"hard"`
}

// Resources bound a sandbox. In a Workload zero means the default; in a Sandbox every field is set.
type Resources struct {
	// Thousandths of a processor.
	CPUMillis uint32 `json:"cpuMillis,omitempty"`
	// Bytes the workload may use. A VM's guest has this much; what the VMM needs comes on top.
	MemoryBytes uint64 `json:"memoryBytes,omitempty"`
	// Processes and threads.
	Pids uint32 `json:"pids,omitempty"`
	// Size of the writable layer, in bytes.
	DiskBytes uint64 `json:"diskBytes,omitempty"`
	// What follows is zero where nothing was asked for, in a Sandbox too.

	// 1 to 10000, as cgroup v2's cpu.weight; 0 is what goes with CPUMillis.
	CPUWeight uint32 `json:"cpuWeight,omitempty"`
	// The kernel's list format: "0-3,8".
	CPUSet string `json:"cpuset,omitempty"`
	// Above it the sandbox is slowed down and reclaimed from.
	MemoryHighBytes uint64 `json:"memoryHighBytes,omitempty"`
	// Beyond MemoryBytes.
	SwapBytes uint64 `json:"swapBytes,omitempty"`
	// Out of memory ends every process, not one.
	OOMGroup bool `json:"oomGroup,omitempty"`
	// Of the disk behind the state directory, a second.
	IOReadBPS   uint64 `json:"ioReadBPS,omitempty"`
	IOWriteBPS  uint64 `json:"ioWriteBPS,omitempty"`
	IOReadIOPS  uint32 `json:"ioReadIOPS,omitempty"`
	IOWriteIOPS uint32 `json:"ioWriteIOPS,omitempty"`
	// Of output kept on the host's disk. No runtime's business; zero in a Sandbox means nothing.
	LogBytes uint64 `json:"logBytes,omitempty"`
}

// LimitsWrites reports whether what is written to disk is limited: that has to reach the disk as the sandbox's own then.
func (r Resources) LimitsWrites() bool { return r.IOWriteBPS > 0 || r.IOWriteIOPS > 0 }

// MountType is what a Mount shows in the sandbox.
type MountType string

const (
	MountBind  MountType = "bind"
	MountTmpfs MountType = "tmpfs"
)

// Mount is something mounted over the image in the sandbox.
type Mount struct {
	Type MountType `json:"type"`
	// On the host; empty for a tmpfs.
	Source string `json:"source,omitempty"`
	// Absolute, in the sandbox.
	Target    string `json:"target"`
	ReadOnly  bool   `json:"readOnly,omitempty"`
	SizeBytes uint64 `json:"sizeBytes,omitempty"`
	Mode      uint32 `json:"mode,omitempty"`
}

// ImageConfig is what an image says about running it.
type ImageConfig struct {
	Entrypoint []string          `json:"entrypoint,omitempty"`
	Command    []string          `json:"command,omitempty"`
	Env        []string          `json:"env,omitempty"`
	User       string            `json:"user,omitempty"`
	WorkingDir string            `json:"workingDir,omitempty"`
	StopSignal string            `json:"stopSignal,omitempty"`
	Labels     map[string]string `json:"labels,omitempty"`
}

// Exit is how a process ended.
type Exit struct {
	// 0 to 255; 128+Signal when a signal ended it.
	Code   int       `json:"code"`
	Signal int       `json:"signal,omitempty"`
	Time   time.Time `json:"time"`
}
