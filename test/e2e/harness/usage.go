package harness

import (
	"encoding/json"
	"testing"
)

// Usage is what `stats --format json` says of one workload.
type Usage struct {
	ID          string
	CPUTime     string `json:"cpuTime"`
	MemoryBytes string
	MemoryLimit string `json:"memoryLimitBytes"`
	Pids        string
	DiskLimit   string `json:"diskLimitBytes"`
	DiskBytes   string
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
