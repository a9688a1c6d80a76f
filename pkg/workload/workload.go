// Package workload is what the daemon does: it keeps one durable record per workload, asks the policy, has a runtime
// build the walls and the agent run the process, and brings every record back to the truth after a restart.
package workload

import (
	"time"

	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// State of a workload.
//
//	          ┌────────────── Start ──────────────┐
//	          ▼                                   │
//	CREATED ─▶ STARTING ─▶ RUNNING ─▶ STOPPING ─▶ EXITED
//	              │         │ ▲ │         │
//	              │   Pause ▼ │ │ Resume  │
//	              │        PAUSED         │
//	              │           │           │
//	              └───────────┴───────────┴─────▶ FAILED ─ Start ─▶ STARTING
//	any ─ Delete ─▶ DELETING ─▶ (no record)
//
// setState in record.go is the only function that assigns it.
type State string

const (
	StateCreated  State = "created"
	StateStarting State = "starting"
	StateRunning  State = "running"
	StatePaused   State = "paused"
	StateStopping State = "stopping"
	StateExited   State = "exited"
	StateFailed   State = "failed"
	StateDeleting State = "deleting"
)

// Workload is a workload as callers see it: a copy, safe to keep.
type Workload struct {
	ID        string            `json:"id"`
	Name      string            `json:"name"`
	Labels    map[string]string `json:"labels,omitempty"`
	Spec      spec.Workload     `json:"spec"`
	CreatedAt time.Time         `json:"createdAt"`
	Status    Status            `json:"status"`
	// The daemon deletes it when it has ended.
	RemoveWhenEnded bool `json:"removeWhenEnded,omitempty"`
	// Who created it. The record keeps it beside this.
	Owner spec.Caller `json:"-"`
}

// Status is how a workload fares.
type Status struct {
	State State `json:"state"`
	// What was decided: container or vm.
	Isolation spec.Isolation  `json:"isolation"`
	Decision  policy.Decision `json:"decision"`
	// "kvm" or "tcg"; empty for a container.
	Accelerator    string `json:"accelerator,omitempty"`
	AgentTransport string `json:"agentTransport,omitempty"`
	// Of a vm: "cold", "template" or "pool", and why it is the first where there was a template.
	StartedFrom string `json:"startedFrom,omitempty"`
	StartNote   string `json:"startNote,omitempty"`
	// Set in EXITED.
	Exit *spec.Exit `json:"exit,omitempty"`
	// One sentence: why it failed or how it ended.
	Message     string      `json:"message,omitempty"`
	StartedAt   time.Time   `json:"startedAt,omitzero"`
	ImageDigest string      `json:"imageDigest"`
	Claims      spec.Claims `json:"claims,omitzero"`
	HostPID     int         `json:"hostPID,omitempty"`
	// What the sandbox is joined to, while it is there.
	Networks []spec.Network `json:"networks,omitempty"`
	// Of the last run; nil unless memory ran out.
	OOM *OOM `json:"oom,omitempty"`
}
