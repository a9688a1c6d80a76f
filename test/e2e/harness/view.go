package harness

import (
	"encoding/json"
	"strings"
	"testing"
	"time"
)

// View is what scripts rely on of a workload's JSON.
type View struct {
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
		// Of a VM.
		StartedFrom, StartNote string
		Networks               []struct {
			Name, Interface, MAC             string
			MTU                              int
			Addresses, Gateways, Nameservers []string
		}
	}
}

func (d *Daemon) Inspect(t *testing.T, ref string) View {
	t.Helper()
	r := d.Call(t, "--format", "json", "inspect", ref)
	var one View
	if err := json.Unmarshal([]byte(r.Stdout), &one); err != nil {
		t.Fatalf("cannot read inspect's JSON: %v\n%s", err, Abridged(r.Stdout))
	}
	if one.ID == "" {
		t.Fatalf("inspect's JSON has no id:\n%s", Abridged(r.Stdout))
	}
	return one
}

// A guest's first line of output takes as long as its start.
const LogTimeout = 30 * time.Second

// WaitForLog waits until the workload has written something that contains text.
func (d *Daemon) WaitForLog(t *testing.T, id, text string) {
	t.Helper()
	Eventually(t, LogTimeout, "log of "+id+" contains "+text, func() (bool, string) {
		r := d.Command("logs", id).Run()
		return r.Code == 0 && strings.Contains(r.Stdout, text), r.Stdout + r.Stderr
	})
}
