package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Check refuses limits that no group of this host can have, with the reason: none is ever dropped.
func Check(l Limits) error {
	g, err := open("check", "x")
	if err != nil {
		return err
	}
	return check(g.h, l)
}

func check(h hierarchies, l Limits) error {
	if l.CPUSet != "" {
		if err := checkCPUSet(l.CPUSet); err != nil {
			return err
		}
	}
	if l.IO.limited() {
		if _, err := diskOf(l.IO.Disk); err != nil {
			return unsatisfiable("cannot limit input and output: %w", err)
		}
	}
	return h.check(l)
}

// unsatisfiable says what this host cannot give.
func unsatisfiable(format string, args ...any) error {
	return spec.Errorf(spec.KindWrongState, format, args...).WithReason(spec.ReasonUnsatisfiable)
}

func checkCPUSet(list string) error {
	asked, err := parseCPUs(list)
	if err != nil {
		return spec.Invalidf("spec.resources.cpuset_cpus", "%w", err)
	}
	b, err := os.ReadFile("/sys/devices/system/cpu/online")
	if err != nil {
		return fmt.Errorf("cannot see which processors there are: %w", err)
	}
	online, err := parseCPUs(strings.TrimSpace(string(b)))
	if err != nil {
		return fmt.Errorf("cannot see which processors there are: %w", err)
	}
	for _, cpu := range asked {
		if !slices.Contains(online, cpu) {
			return unsatisfiable("this host has no processor %d: it has %s", cpu, strings.TrimSpace(string(b)))
		}
	}
	return nil
}

// maxCPU is more than any kernel numbers (NR_CPUS is 8192 at most).
const maxCPU = 8191

// parseCPUs reads the kernel's list format: 0-3,8.
func parseCPUs(list string) ([]int, error) {
	var cpus []int
	for part := range strings.SplitSeq(list, ",") {
		first, last, isRange := strings.Cut(part, "-")
		if !isRange {
			last = first
		}
		from, err1 := strconv.Atoi(first)
		to, err2 := strconv.Atoi(last)
		if err1 != nil || err2 != nil || from < 0 || to < from || to > maxCPU {
			return nil, fmt.Errorf("%q is no list of processors: write 0-3,8", list)
		}
		for cpu := from; cpu <= to; cpu++ {
			cpus = append(cpus, cpu)
		}
	}
	return cpus, nil
}

// check implements hierarchies. cgroup v1 lacks what v2 has in these places; something near it would be another demand.
func (v1) check(l Limits) error {
	switch {
	case l.MemoryHighBytes > 0:
		return unsatisfiable("this host has cgroup v1, which has no memory.high: leave memory_high_bytes out, or boot it with systemd.unified_cgroup_hierarchy=1")
	case l.OOMGroup:
		return unsatisfiable("this host has cgroup v1, which kills one process, not the group, when memory runs out: leave oom_group out, or boot it with systemd.unified_cgroup_hierarchy=1")
	case !l.IO.Direct && (l.IO.WriteBPS > 0 || l.IO.WriteIOPS > 0):
		return unsatisfiable("this host has cgroup v1, which does not know whose writes it puts off: leave io_write_* out, ask for vm isolation, or boot the host with systemd.unified_cgroup_hierarchy=1")
	case l.SwapBytes > 0 && !exists(filepath.Join(root, "memory/memory.memsw.limit_in_bytes")):
		return unsatisfiable("this host's kernel does not count swap: leave swap_bytes out, or boot it with swapaccount=1")
	case l.CPUSet != "" && !exists(filepath.Join(root, "cpuset/cpuset.cpus")):
		return unsatisfiable("this host has not mounted the cgroup controller cpuset: leave cpuset_cpus out, or mount it on %s/cpuset", root)
	case l.IO.limited() && !exists(filepath.Join(root, blkio, "blkio.throttle.read_bps_device")):
		return unsatisfiable("this host has not mounted the cgroup controller blkio: leave io_* out, or mount it on %s/%s", root, blkio)
	}
	return nil
}

// check implements hierarchies.
func (v2) check(l Limits) error {
	for _, c := range []struct {
		controller, field string
		needed            bool
	}{
		{"cpuset", "cpuset_cpus", l.CPUSet != ""},
		{"io", "io_*", l.IO.limited()},
	} {
		if c.needed && !hasController(c.controller) {
			return unsatisfiable("this host's cgroups have no controller %s: leave %s out, or have it delegated to sandboxd", c.controller, c.field)
		}
	}
	return nil
}

// hasController reports whether the v2 hierarchy has a controller.
func hasController(name string) bool {
	b, err := os.ReadFile(filepath.Join(root, "cgroup.controllers"))
	return err == nil && slices.Contains(strings.Fields(string(b)), name)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
