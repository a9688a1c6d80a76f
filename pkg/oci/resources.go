package oci

import (
	"strconv"

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
	if r.MemoryHighBytes > r.MemoryBytes && r.MemoryBytes != 0 {
		return spec.Invalidf("spec.resources.memory_high_bytes", "memory_high_bytes is above memory_bytes (%d MiB), where it never matters: give less", r.MemoryBytes>>20)
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
	if r.CPUSet != "" {
		if out.CPU == nil {
			out.CPU = &specs.LinuxCPU{}
		}
		out.CPU.Cpus = r.CPUSet
	}
	unified := map[string]string{}
	if r.CPUWeight > 0 {
		unified["cpu.weight"] = strconv.FormatUint(uint64(r.CPUWeight), 10)
	}
	if r.MemoryHighBytes > 0 {
		unified["memory.high"] = strconv.FormatUint(r.MemoryHighBytes, 10)
	}
	if r.OOMGroup {
		unified["memory.oom.group"] = "1"
	}
	if len(unified) > 0 {
		out.Unified = unified
	}
	if out.Memory != nil && r.SwapBytes > 0 {
		both := *out.Memory.Limit + int64(min(r.SwapBytes, 1<<60))
		out.Memory.Swap = &both
	}
	if r.Pids > 0 {
		limit := int64(r.Pids)
		out.Pids = &specs.LinuxPids{Limit: &limit}
	}
	return out
}
