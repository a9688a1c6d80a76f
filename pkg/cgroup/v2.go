package cgroup

import (
	"errors"
	"io/fs"
	"path/filepath"
	"syscall"
	"time"

	"github.com/containerd/cgroups/v3/cgroup2"

	"github.com/sandboxd/sandboxd/pkg/osthread"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// cpuPeriod is the kernel's default, in microseconds.
	cpuPeriod = 100_000
	// minQuota is the smallest quota the kernel takes, in microseconds.
	minQuota = 1000
)

// cpuQuota is microseconds per cpuPeriod.
func cpuQuota(millis uint32) int64 {
	return max(minQuota, int64(millis)*cpuPeriod/1000)
}

// cpuShares is what the sandbox gets when processors are short: v1's unit, 1024 for one processor.
func cpuShares(millis uint32) uint64 {
	return min(max(2, uint64(millis)*1024/1000), 262144)
}

// cpuWeight is the same in v2's unit, converted as the OCI runtime-spec does.
func cpuWeight(millis uint32) uint64 {
	return 1 + (cpuShares(millis)-2)*9999/262142
}

// v2 has one hierarchy with all controllers.
type v2 struct{}

func (v2) create(path string, l Limits) error {
	r := &cgroup2.Resources{CPU: &cgroup2.CPU{}, Memory: &cgroup2.Memory{}, Pids: &cgroup2.Pids{}, Devices: deviceRules(l.Devices)}
	if l.CPUMillis > 0 {
		period, quota, weight := uint64(cpuPeriod), cpuQuota(l.CPUMillis), cpuWeight(l.CPUMillis)
		r.CPU.Weight = &weight
		r.CPU.Max = cgroup2.NewCPUMax(&quota, &period)
	}
	if l.MemoryBytes > 0 {
		limit := int64(l.MemoryBytes)
		r.Memory.Max = &limit
	}
	if l.Pids > 0 {
		r.Pids.Max = int64(l.Pids)
	}
	if _, err := cgroup2.NewManager(root, path, r); err != nil {
		return err
	}
	if l.MemoryBytes == 0 {
		return nil
	}
	// Not through the library: a kernel that was built or booted without swap has no such file, and needs none.
	if err := writeFile(filepath.Join(root, path, "memory.swap.max"), "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (v2) dirs(path string) []string { return []string{filepath.Join(root, path)} }

// start leaves the group to attr, which carries its descriptor (CLONE_INTO_CGROUP). The thread is for what fn does to it.
func (v2) start(_ string, attr *syscall.SysProcAttr, fn func(*syscall.SysProcAttr) error) error {
	return osthread.Run(func() error { return fn(attr) })
}

func (v2) kill(path string) error {
	return writeFile(filepath.Join(root, path, "cgroup.kill"), "1")
}

func (v2) usage(path string) (spec.Usage, error) {
	m, err := cgroup2.Load(path)
	if err != nil {
		return spec.Usage{}, err
	}
	s, err := m.StatFiltered(cgroup2.StatPids | cgroup2.StatCPU | cgroup2.StatMemory)
	if err != nil {
		return spec.Usage{}, err
	}
	return spec.Usage{
		CPUTime:          time.Duration(s.GetCPU().GetUsageUsec()) * time.Microsecond,
		MemoryBytes:      s.GetMemory().GetUsage(),
		MemoryPeakBytes:  s.GetMemory().GetMaxUsage(),
		MemoryCacheBytes: s.GetMemory().GetFile(),
		MemoryLimitBytes: s.GetMemory().GetUsageLimit(),
		Pids:             s.GetPids().GetCurrent(),
		PidsLimit:        s.GetPids().GetLimit(),
	}, nil
}
