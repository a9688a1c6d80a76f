package oci

import (
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func TestSeccompProfiles(t *testing.T) {
	with := func(s spec.Seccomp, caps ...string) (*specs.Spec, error) {
		return Config(testID, spec.Workload{Process: command("x"), Seccomp: s, CapAdd: caps}, spec.ImageConfig{}, spec.IsolationContainer)
	}
	c, err := with(spec.Seccomp{Unconfined: true})
	if err != nil || c.Linux.Seccomp != nil {
		t.Errorf("unconfined: %v %v", c, err)
	}
	// docker's format: rules that depend on capabilities, and architectures, which come down to ours.
	const profile = `{"defaultAction": "SCMP_ACT_ALLOW", "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
		"syscalls": [
			{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 122, "comment": "no directories"},
			{"names": ["mount"], "action": "SCMP_ACT_ERRNO", "excludes": {"caps": ["CAP_SYS_ADMIN"]}}]}`
	for caps, rules := range map[string]int{"CAP_KILL": 2, "CAP_SYS_ADMIN": 1} {
		c, err := with(spec.Seccomp{Profile: profile}, caps)
		if err != nil {
			t.Fatal(err)
		}
		if p := c.Linux.Seccomp; len(p.Syscalls) != rules || len(p.Architectures) != 1 || p.Architectures[0] != specs.ArchX86_64 {
			t.Errorf("%s: %+v", caps, p)
		}
	}
	for what, c := range map[string]struct {
		s    spec.Seccomp
		says string
	}{
		"both":              {spec.Seccomp{Unconfined: true, Profile: profile}, "at once"},
		"no JSON":           {spec.Seccomp{Profile: "unconfined"}, "invalid character"},
		"empty":             {spec.Seccomp{Profile: "{}"}, "no defaultAction"},
		"null":              {spec.Seccomp{Profile: "null"}, "no defaultAction"},
		"a null rule":       {spec.Seccomp{Profile: `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[null]}`}, "null"},
		"unknown field":     {spec.Seccomp{Profile: `{"defaultAction":"SCMP_ACT_ALLOW","syscals":[]}`}, "syscals"},
		"unknown condition": {spec.Seccomp{Profile: `{"defaultAction":"SCMP_ACT_ERRNO","syscalls":[{"names":["read"],"action":"SCMP_ACT_ALLOW","include":{}}]}`}, "include"},
		"two documents":     {spec.Seccomp{Profile: `{"defaultAction":"SCMP_ACT_ALLOW"}{}`}, "follows"},
		"unknown call":      {spec.Seccomp{Profile: `{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[{"names":["mkdirr"],"action":"SCMP_ACT_KILL"}]}`}, "mkdirr"},
		"a supervisor":      {spec.Seccomp{Profile: `{"defaultAction":"SCMP_ACT_NOTIFY"}`}, "not supported"},
		"a listener":        {spec.Seccomp{Profile: `{"defaultAction":"SCMP_ACT_ALLOW","listenerPath":"/x"}`}, "listener"},
		"flags":             {spec.Seccomp{Profile: `{"defaultAction":"SCMP_ACT_ALLOW","flags":["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]}`}, "flags"},
		"too large":         {spec.Seccomp{Profile: profile + strings.Repeat(" ", maxProfile)}, "256 KiB"},
	} {
		_, err := with(c.s)
		if spec.KindOf(err) != spec.KindInvalid || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
