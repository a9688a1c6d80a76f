package main

import (
	"fmt"

	"github.com/spf13/pflag"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// resourceFlags are what create, run, update and policy explain say about limits. Names are docker's where docker has the
// same thing.
type resourceFlags struct {
	cpus, memory, disk, memoryHigh, memorySwap, ioReadBPS, ioWriteBPS, logSize string
	cpuset                                                                     string
	pids, cpuWeight, ioReadIOPS, ioWriteIOPS                                   uint32
	oomGroup                                                                   bool

	set *pflag.FlagSet
}

func (c *resourceFlags) register(f *pflag.FlagSet) {
	c.set = f
	f.StringVar(&c.cpus, "cpus", "", "processors it may use, such as 1.5")
	f.Uint32Var(&c.cpuWeight, "cpu-weight", 0, "its part when processors are short, 1 to 10000, against others' weights; 39 for one processor")
	f.StringVar(&c.cpuset, "cpuset-cpus", "", "the only processors of the host it may run on, such as 0-3,8")
	f.StringVar(&c.memory, "memory", "", "memory it may use, such as 256m")
	f.StringVar(&c.memoryHigh, "memory-high", "", "memory above which it is slowed down and reclaimed from; needs cgroup v2")
	f.StringVar(&c.memorySwap, "memory-swap", "", "memory and swap together, such as 512m; without it no swap")
	f.BoolVar(&c.oomGroup, "oom-group", false, "when memory runs out kill all of its processes, not one; a container needs cgroup v2 for it")
	f.Uint32Var(&c.pids, "pids", 0, "processes and threads at once")
	f.StringVar(&c.disk, "disk", "", "size of the writable layer, such as 1g")
	f.StringVar(&c.ioReadBPS, "io-read-bps", "", "bytes it may read from the disk a second, such as 10m")
	f.StringVar(&c.ioWriteBPS, "io-write-bps", "", "bytes it may write to it a second; needs cgroup v2")
	f.Uint32Var(&c.ioReadIOPS, "io-read-iops", 0, "reads from the disk a second")
	f.Uint32Var(&c.ioWriteIOPS, "io-write-iops", 0, "writes to it a second; needs cgroup v2")
	f.StringVar(&c.logSize, "log-size", "", "how much of its output is kept on the host's disk, such as 10m; the oldest goes first")
}

// flagFields are the fields of Resources that flags set.
var flagFields = []struct{ flag, field string }{
	{"cpus", "cpu_millis"}, {"cpu-weight", "cpu_weight"}, {"cpuset-cpus", "cpuset_cpus"},
	{"memory", "memory_bytes"}, {"memory-high", "memory_high_bytes"}, {"memory-swap", "swap_bytes"}, {"oom-group", "oom_group"},
	{"pids", "pids"}, {"disk", "disk_bytes"},
	{"io-read-bps", "io_read_bps"}, {"io-write-bps", "io_write_bps"}, {"io-read-iops", "io_read_iops"}, {"io-write-iops", "io_write_iops"},
	{"log-size", "log_bytes"},
}

// fields are those that were given.
func (c *resourceFlags) fields() []string {
	var given []string
	for _, f := range flagFields {
		if c.set.Changed(f.flag) {
			given = append(given, f.field)
		}
	}
	return given
}

// resources are what the flags say. memory is what --memory-swap is counted from when --memory is not given; 0 if unknown.
func (c *resourceFlags) resources(memory uint64) (*sandboxdv1.Resources, error) {
	r := &sandboxdv1.Resources{
		Pids: c.pids, CpuWeight: c.cpuWeight, CpusetCpus: c.cpuset, OomGroup: c.oomGroup,
		IoReadIops: c.ioReadIOPS, IoWriteIops: c.ioWriteIOPS,
	}
	if c.cpus != "" {
		millis, err := parseCPUs(c.cpus)
		if err != nil {
			return nil, err
		}
		r.CpuMillis = millis
	}
	var swap uint64
	for _, size := range []struct {
		flag, value string
		into        *uint64
	}{
		{"memory", c.memory, &r.MemoryBytes}, {"memory-high", c.memoryHigh, &r.MemoryHighBytes}, {"memory-swap", c.memorySwap, &swap},
		{"disk", c.disk, &r.DiskBytes}, {"io-read-bps", c.ioReadBPS, &r.IoReadBps}, {"io-write-bps", c.ioWriteBPS, &r.IoWriteBps},
		{"log-size", c.logSize, &r.LogBytes},
	} {
		if size.value == "" {
			continue
		}
		n, err := parseBytes(size.value)
		if err != nil {
			return nil, fmt.Errorf("--%s: %w", size.flag, err)
		}
		*size.into = n
	}
	if swap == 0 {
		return r, nil
	}
	if r.GetMemoryBytes() != 0 {
		memory = r.GetMemoryBytes()
	}
	switch {
	case memory == 0:
		return nil, fmt.Errorf("cannot use --memory-swap without --memory: it is memory and swap together")
	case swap < memory:
		return nil, fmt.Errorf("cannot use --memory-swap %s: it is memory and swap together, and memory alone is %s", c.memorySwap, size(memory))
	}
	r.SwapBytes = swap - memory
	return r, nil
}
