package microvm

import (
	"fmt"
	"slices"
	"strings"
	"sync"
)

// kernelSaid is what the guest's console told of its end. It is a claim: a guest's kernel that was taken over says what it
// likes.
type kernelSaid struct {
	mu sync.Mutex
	// Guarded by mu.
	panicked, agent string
	restarted       bool
}

const (
	// What Linux says when it can't go on (kernel/panic.c), and when it was told to end (kernel/reboot.c).
	panicMark   = "Kernel panic - not syncing: "
	restartMark = "reboot: "
	// What our own agent says when it can't go on.
	agentMark = "sandbox-agent: "
	// maxReason bounds what of such a line is repeated.
	maxReason = 200
)

func (k *kernelSaid) note(line string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, reason, ok := strings.Cut(line, panicMark); ok && k.panicked == "" {
		k.panicked = bounded(reason)
	} else if strings.Contains(line, restartMark) {
		k.restarted = true
	} else if _, reason, ok := strings.Cut(line, agentMark); ok {
		k.agent = bounded(reason)
	}
}

func bounded(s string) string {
	if len(s) > maxReason {
		s = strings.ToValidUTF8(s[:maxReason], "") + "…"
	}
	return s
}

// Which of a VM's processes.
const (
	memberQEMU   = "QEMU"
	memberHelper = "the vsock helper"
)

// death is the end of one of a VM's processes.
type death struct {
	member string
	status exitStatus
	err    error // the wait was given up
}

func (d death) String() string { return fmt.Sprintf("%s %v", d.member, d.status) }

// well reports whether a process is known to have ended as it should.
func (s exitStatus) well() bool { return s.known && s.code == 0 && s.signal == 0 }

// explain says why a VM ended, whose processes died in this order.
func (i *instance) explain(deaths []death) string {
	k := &i.voices.kernel
	k.mu.Lock()
	panicked, agent, restarted := k.panicked, k.agent, k.restarted
	k.mu.Unlock()
	said := func(d death, v *voice) string {
		if q := quote(v); q != "" {
			return fmt.Sprintf("%v: %s", d, q)
		}
		return fmt.Sprintf("%v and said nothing", d)
	}
	qemu := deaths[slices.IndexFunc(deaths, func(d death) bool { return d.member == memberQEMU })]
	switch first := deaths[0]; {
	case panicked != "":
		return "the guest's kernel panicked: " + panicked
	case i.killed.Load():
		return "it was killed"
	case first.member == memberHelper && !first.status.well():
		return said(first, i.voices.helper)
	case !qemu.status.well():
		return said(qemu, i.voices.qemu)
	case agent != "":
		return "the guest's agent gave up: " + agent
	case restarted:
		return "the guest's kernel was told to restart or to power off"
	default:
		return "the guest was reset without a word of its kernel: a triple fault"
	}
}
