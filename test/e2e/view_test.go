package e2e

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// view is what scripts rely on of a workload's JSON.
type view struct {
	ID     string
	Name   string
	Labels map[string]string
	Status struct {
		State          string
		Isolation      string
		Accelerator    string
		AgentTransport string
		Decision       struct{ Rule, Reason string }
		// Absent until the process has ended.
		ExitCode      *int
		Message       string
		KernelRelease string
		BootID        string `json:"bootId"`
		HostPID       int    `json:"hostPid"`
	}
}

func (d *daemon) inspect(t *testing.T, ref string) view {
	t.Helper()
	r := d.call(t, "--format", "json", "inspect", ref)
	var one view
	if err := json.Unmarshal([]byte(r.stdout), &one); err != nil {
		t.Fatalf("cannot read inspect's JSON: %v\n%s", err, abridged(r.stdout))
	}
	if one.ID == "" {
		t.Fatalf("inspect's JSON has no id:\n%s", abridged(r.stdout))
	}
	return one
}

// A guest's first line of output takes as long as its start.
const logTimeout = 30 * time.Second

// waitForLog waits until the workload has written something that contains text.
func (d *daemon) waitForLog(t *testing.T, id, text string) {
	t.Helper()
	eventually(t, logTimeout, "log of "+id+" contains "+text, func() (bool, string) {
		r := d.command("logs", id).run()
		return r.code == 0 && strings.Contains(r.stdout, text), r.stdout + r.stderr
	})
}
