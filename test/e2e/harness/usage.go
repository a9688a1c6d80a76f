package harness

import (
	"encoding/json"
	"os"
	"strconv"
	"testing"
	"time"
)

// Usage is what `stats --format json` says of one workload.
type Usage struct {
	ID               string
	CPUTime          string `json:"cpuTime"`
	CPUThrottled     string `json:"cpuThrottledTime"`
	MemoryBytes      string
	MemoryLimit      string `json:"memoryLimitBytes"`
	MemoryWorkingSet string `json:"memoryWorkingSetBytes"`
	MemoryCache      string `json:"memoryCacheBytes"`
	MemoryPeak       string `json:"memoryPeakBytes"`
	GuestAvailable   string `json:"guestMemoryAvailableBytes"`
	Pids             string
	DiskLimit        string `json:"diskLimitBytes"`
	DiskBytes        string
	IOReadBytes      string `json:"ioReadBytes"`
	IOWriteBytes     string `json:"ioWriteBytes"`
	// Nil where the host's kernel has no PSI.
	CPUPressure, MemoryPressure, IOPressure *Pressure
}

// Pressure is how long something waited.
type Pressure struct {
	SomeTotal string `json:"someTotal"`
}

// HasPSI reports whether this host's kernel measures pressure.
func HasPSI() bool {
	_, err := os.Stat("/proc/pressure/cpu")
	return err == nil
}

// Some is how long something waited, all told. Without PSI there must be no pressure, and Some is false.
func (p *Pressure) Some(t *testing.T) (waited time.Duration, ok bool) {
	t.Helper()
	if has := HasPSI(); has != (p != nil) {
		t.Fatalf("the host's PSI: %t; stats: %+v", has, p)
	}
	if p == nil {
		return 0, false
	}
	waited, err := time.ParseDuration(p.SomeTotal)
	if err != nil && p.SomeTotal != "" {
		t.Fatalf("a pressure's total is %q", p.SomeTotal)
	}
	return waited, true
}

// Number is one of a message's, which JSON has as a string, and leaves out at zero.
func Number(t *testing.T, what, value string) int64 {
	t.Helper()
	if value == "" {
		return 0
	}
	n, err := strconv.ParseInt(value, 10, 64)
	if err != nil {
		t.Fatalf("%s is %q, no number", what, value)
	}
	return n
}

// Usage is what a workload uses now.
func (d *Daemon) Usage(t *testing.T, id string) Usage {
	t.Helper()
	r := d.Call(t, "--format", "json", "stats", "--no-stream", id)
	var u Usage
	if err := json.Unmarshal([]byte(r.Stdout), &u); err != nil {
		t.Fatalf("cannot read stats: %v\n%s", err, r.Stdout)
	}
	return u
}
