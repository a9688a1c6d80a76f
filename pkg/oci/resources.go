package oci

import (
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// cpuPeriod is the length of the CFS period a CPU quota is counted in, in microseconds: the kernel's own default.
	cpuPeriod = 100_000
	// minMemory is what the agent needs to serve at all, as the API has it, too.
	minMemory = 16 << 20
	// minGuestMemory is with what a guest boots; package microvm starts none with less.
	minGuestMemory = 96 << 20
	// maxTmpfsSize is beyond any memory. Near 2^64 the kernel's count of pages overflows to 0, which it takes for no limit.
	maxTmpfsSize = 1 << 44
)

// checkResources refuses what no sandbox of the granted isolation can start with. Zero is the daemon's default.
func checkResources(r spec.Resources, granted spec.Isolation) error {
	least, who := uint64(minMemory), "a sandbox's agent does not run"
	if granted == spec.IsolationVM {
		least, who = minGuestMemory, "a microVM's guest does not boot"
	}
	if r.MemoryBytes != 0 && r.MemoryBytes < least {
		return spec.Invalidf("spec.resources.memory_bytes", "%s with %d bytes of memory: give it %d (%d MiB) or more", who, r.MemoryBytes, least, least>>20)
	}
	if r.DiskBytes != 0 && (r.DiskBytes < disk.MinSize || r.DiskBytes > disk.MaxSize) {
		return spec.Invalidf("spec.resources.disk_bytes", "a writable layer cannot have %d bytes: give it between %d and %d", r.DiskBytes, uint64(disk.MinSize), uint64(disk.MaxSize))
	}
	return nil
}

func resourcesOf(r spec.Resources) *specs.LinuxResources {
	out := &specs.LinuxResources{}
	if r.CPUMillis > 0 {
		period := uint64(cpuPeriod)
		quota := int64(r.CPUMillis) * cpuPeriod / 1000
		out.CPU = &specs.LinuxCPU{Quota: &quota, Period: &period}
	}
	if r.MemoryBytes > 0 {
		limit := int64(min(r.MemoryBytes, 1<<62))
		out.Memory = &specs.LinuxMemory{Limit: &limit}
	}
	if r.Pids > 0 {
		limit := int64(r.Pids)
		out.Pids = &specs.LinuxPids{Limit: &limit}
	}
	return out
}
