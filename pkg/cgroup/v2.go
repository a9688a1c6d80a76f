package cgroup

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
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

// weightShares is a v2 weight in v1's unit, 2 to 262144: the inverse of cpuWeight.
func weightShares(weight uint32) uint64 {
	return 2 + (uint64(weight)-1)*262142/9999
}

// v2 has one hierarchy with all controllers.
type v2 struct{}

func (v v2) create(path string, l Limits) error {
	r := v2Resources(l)
	if hasController("io") {
		r.IO = &cgroup2.IO{} // it counts, too
	}
	if _, err := cgroup2.NewManager(root, path, r); err != nil {
		return err
	}
	if err := attachDevices(path, deviceRules(l.Devices)); err != nil {
		return err
	}
	if err := v.makeInner(path, l); err != nil {
		return err
	}
	return v.rest(path, l, false)
}

// prepare: a process is cloned into the one group, which should be whole by then.
func (v v2) prepare(path string, l Limits) error { return v.create(path, l) }

func (v2) complete(string, Limits) error { return nil }

func (v2) doors(string, Limits) []string { return nil }

func v2Resources(l Limits) *cgroup2.Resources {
	r := &cgroup2.Resources{CPU: &cgroup2.CPU{Cpus: l.CPUSet}, Memory: &cgroup2.Memory{}, Pids: &cgroup2.Pids{}}
	if l.CPUMillis > 0 {
		period, quota, weight := uint64(cpuPeriod), cpuQuota(l.CPUMillis), cpuWeight(l.CPUMillis)
		r.CPU.Weight = &weight
		r.CPU.Max = cgroup2.NewCPUMax(&quota, &period)
	}
	if l.CPUWeight > 0 {
		weight := uint64(l.CPUWeight)
		r.CPU.Weight = &weight
	}
	if l.MemoryBytes > 0 {
		limit := int64(l.MemoryBytes)
		r.Memory.Max = &limit
	}
	if l.Pids > 0 {
		r.Pids.Max = int64(l.Pids)
	}
	return r
}

// rest sets what the library cannot: it knows no "max" but for quotas, and a kernel that was built or booted without swap
// has no file for it, and needs none. Of a group that has had limits, those that are gone are lifted.
func (v2) rest(path string, l Limits, had bool) error {
	type setting struct {
		file, value string
		needed      bool
		// For a person whose kernel has no such file.
		lack string
	}
	orMax := func(n uint64) string {
		if n == 0 {
			return "max"
		}
		return strconv.FormatUint(n, 10)
	}
	group := map[bool]string{false: "0", true: "1"}[l.OOMGroup]
	settings := []setting{
		{"memory.high", orMax(l.MemoryHighBytes), l.MemoryHighBytes > 0, "memory.high"},
		{"memory.oom.group", group, l.OOMGroup, "memory.oom.group"},
	}
	if l.MemoryBytes > 0 {
		settings = append(settings, setting{"memory.swap.max", strconv.FormatUint(l.SwapBytes, 10), true, ""})
	}
	if l.CPUSet == "" {
		// Not the empty list, which a 6.1 kernel refuses to a group with processes: all that the parent has.
		if all, err := os.ReadFile(filepath.Join(root, filepath.Dir(path), "cpuset.cpus.effective")); err == nil {
			settings = append(settings, setting{"cpuset.cpus", strings.TrimSpace(string(all)), false, ""})
		}
	}
	if d, err := diskOf(l.IO.Disk); err == nil {
		settings = append(settings, setting{"io.max", l.IO.ioMax(d), l.IO.limited(), "io.max"})
	} else if l.IO.limited() {
		return err
	}
	for _, s := range settings {
		if !s.needed && !had {
			continue
		}
		err := writeFile(filepath.Join(root, path, s.file), s.value)
		missing := errors.Is(err, fs.ErrNotExist)
		switch {
		case missing && s.file == "memory.swap.max" && l.SwapBytes > 0:
			return unsatisfiable("this host's kernel does not count swap: leave swap_bytes out")
		case missing && s.needed && s.lack != "":
			return unsatisfiable("this host's kernel has no %s", s.lack)
		case err != nil && !missing:
			return err
		}
	}
	return nil
}

func (v v2) update(path string, l Limits) error {
	m, err := cgroup2.Load(path)
	if err != nil {
		return err
	}
	r := v2Resources(l)
	if err := m.ToggleControllers(r.EnabledControllers(), cgroup2.Enable); err != nil {
		return err
	}
	if err := m.Update(r); err != nil {
		return err
	}
	if err := updateInner(innerV2(path), l); err != nil {
		return err
	}
	return v.rest(path, l, true)
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
	s, err := m.StatFiltered(cgroup2.StatPids | cgroup2.StatCPU | cgroup2.StatMemory | cgroup2.StatMemoryEvents)
	if err != nil {
		return spec.Usage{}, err
	}
	u := spec.Usage{
		CPUTime:          time.Duration(s.GetCPU().GetUsageUsec()) * time.Microsecond,
		CPUThrottled:     time.Duration(s.GetCPU().GetThrottledUsec()) * time.Microsecond,
		MemoryBytes:      s.GetMemory().GetUsage(),
		MemoryPeakBytes:  s.GetMemory().GetMaxUsage(),
		MemoryCacheBytes: s.GetMemory().GetFile(),
		MemoryLimitBytes: s.GetMemory().GetUsageLimit(),
		SwapBytes:        s.GetMemory().GetSwapUsage(),
		OOMKills:         s.GetMemoryEvents().GetOomKill(),
		Pids:             s.GetPids().GetCurrent(),
		PidsLimit:        s.GetPids().GetLimit(),
	}
	u.MemoryWorkingSetBytes = u.MemoryBytes - min(u.MemoryBytes, s.GetMemory().GetInactiveFile())
	b, err := os.ReadFile(filepath.Join(root, path, "io.stat"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // no such controller
		return spec.Usage{}, err
	}
	parseIOStat(string(b), &u)
	return u, nil
}
