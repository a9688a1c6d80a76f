package agent

import (
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// FuzzLaunched: by the time an agent says how a launch went, the workload runs, and may be the one who says it.
func FuzzLaunched(f *testing.F) {
	for _, r := range []*agentv1.LaunchResult{
		{},
		{Configure: &agentv1.ConfigureResponse{ProtocolVersion: spec.ProtocolVersion, AgentVersion: "1\x1b[2J"}, Process: &agentv1.ExecResponse{Pid: 7}},
		{Configure: &agentv1.ConfigureResponse{ProtocolVersion: spec.ProtocolVersion, KernelRelease: strings.Repeat("x", 4096)}, Process: &agentv1.ExecResponse{Pid: -7}},
		{Configure: &agentv1.ConfigureResponse{ProtocolVersion: spec.ProtocolVersion + 1}},
		{Configure: &agentv1.ConfigureResponse{ProtocolVersion: spec.ProtocolVersion}, Process: &agentv1.ExecResponse{
			Pid: 7, Failure: &agentv1.ExecFailure{Reason: agentv1.ExecFailure_REASON_NOT_FOUND, Message: "\x1b]0;owned\a"}}},
		{Code: 3, Message: strings.Repeat("no\n", 4096)},
		{Code: 1 << 31},
		{Code: 1}, // as if this side had called it off
	} {
		b, err := proto.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add(make([]byte, spec.MaxLaunchBytes+1))
	f.Fuzz(func(t *testing.T, b []byte) {
		claims, p, err := (&Client{}).Launched(Launch{ProcessID: "p"}, b)
		if (p == nil) == (err == nil) {
			t.Fatalf("process %v, error %v", p, err)
		}
		if err != nil {
			const most = maxMessage * 8 // what text makes of a byte, and what comes around it
			if s := err.Error(); len(s) > most || strings.ContainsAny(s, "\x1b\a\r") {
				t.Errorf("an error of %d bytes: %q", len(s), s)
			}
			return
		}
		if p.PID <= 1 {
			t.Errorf("pid %d", p.PID)
		}
		for _, s := range []string{claims.AgentVersion, claims.KernelRelease, claims.BootID} {
			if len(s) > maxName*8 || strings.ContainsAny(s, "\x1b\a\r\n") {
				t.Errorf("claim %q", s)
			}
		}
	})
}
