package oci

import (
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func agentSimulator(t *testing.T, profile *specs.LinuxSeccomp, granted spec.Isolation) func(syscallData) uint32 {
	t.Helper()
	filter, err := CompileAgentSeccomp(profile, granted)
	if err != nil {
		t.Fatal(err)
	}
	sim := newSimulator(t, filter)
	return func(d syscallData) uint32 {
		d.arch = unix.AUDIT_ARCH_X86_64
		return sim.run(t, d)
	}
}

// Behind the default profile a container's agent may ask nothing of the host's kernel that the workload may not; a guest's
// agent may ask a few things more of its own.
func TestAgentFilterAddsLittle(t *testing.T) {
	profile := profileWith(t, nil, nil)
	workload, err := CompileSeccomp(profile)
	if err != nil {
		t.Fatal(err)
	}
	own := newSimulator(t, workload)
	names, _ := byNumber(profile)
	for granted, more := range map[spec.Isolation]map[string]bool{
		spec.IsolationContainer: {},
		spec.IsolationVM:        {"clone3": true, "socket": true, "fspick": true, "fsconfig": true, "reboot": true, "clock_settime": true, "sethostname": true},
	} {
		agent := agentSimulator(t, profile, granted)
		differ := map[string]bool{}
		for nr := range uint32(600) {
			for _, args := range boundaries(profile, names[nr]) {
				d := syscallData{nr: nr, arch: unix.AUDIT_ARCH_X86_64, args: args}
				if agent(d) != own.run(t, d) {
					differ[names[nr]] = true
				}
			}
		}
		for name := range differ {
			if !more[name] {
				t.Errorf("%s: %q is treated differently for the agent", granted, name)
			}
		}
		for name := range more {
			if !differ[name] {
				t.Errorf("%s: %q is as the profile has it, and need not be among the agent's", granted, name)
			}
		}
	}
}

// However little a profile allows, the agent can work; what would end the workload does not end the agent.
func TestAgentFilterUnderANarrowProfile(t *testing.T) {
	nr := syscallNumbers
	for _, action := range []specs.LinuxSeccompAction{specs.ActErrno, specs.ActKillProcess, specs.ActKill, specs.ActTrap} {
		agent := agentSimulator(t, &specs.LinuxSeccomp{DefaultAction: action, Syscalls: []specs.LinuxSyscall{
			{Names: []string{"execve"}, Action: specs.ActAllow}, {Names: []string{"kill"}, Action: specs.ActKillProcess},
			{Names: []string{"chroot"}, Action: specs.ActAllow},
		}}, spec.IsolationContainer)
		for call, want := range map[syscallData]uint32{
			{nr: nr["execve"]}: unix.SECCOMP_RET_ALLOW,
			{nr: nr["kill"]}:   unix.SECCOMP_RET_ALLOW,
			{nr: nr["chroot"]}: unix.SECCOMP_RET_ALLOW, // or a stage's child could not
			{nr: nr["mount"]}:  retErrno | uint32(unix.EPERM),
			{nr: nr["reboot"]}: retErrno | uint32(unix.EPERM),
			{nr: nr["clone"], args: [6]uint64{unix.CLONE_THREAD}}:  unix.SECCOMP_RET_ALLOW,
			{nr: nr["clone"], args: [6]uint64{unix.CLONE_NEWUSER}}: retErrno | uint32(unix.EPERM),
		} {
			if got := agent(call); got != want {
				t.Errorf("%s: call %d %v: %#x, want %#x", action, call.nr, call.args, got, want)
			}
		}
	}
	if filter, err := CompileAgentSeccomp(nil, spec.IsolationVM); filter != nil || err != nil {
		t.Errorf("without a profile: %d bytes, %v", len(filter), err)
	}
	if _, err := CompileAgentSeccomp(profileWith(t, nil, nil), ""); err == nil {
		t.Error("an isolation that nobody decided was taken")
	}
	for _, c := range agentCalls {
		for _, name := range c.names {
			if _, known := syscallNumbers[name]; !known {
				t.Errorf("%q is no system call", name)
			}
		}
	}
}
