package oci

import (
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// capAll stands for every capability in a request.
const capAll = "ALL"

// defaultCapabilities are docker's fourteen. Behind either wall they reach no further than it: a container's are those of
// its user namespace.
var defaultCapabilities = []struct{ name, reason string }{
	{"CAP_AUDIT_WRITE", "login programs write audit records"},
	{"CAP_CHOWN", "package managers give files to users"},
	{"CAP_DAC_OVERRIDE", "root writes other users' files"},
	{"CAP_FOWNER", "root changes modes of other users' files"},
	{"CAP_FSETID", "set-group-id bits survive a write"},
	{"CAP_KILL", "root signals other users' processes"},
	{"CAP_MKNOD", "package managers make fifos; real device nodes need the initial user namespace too"},
	{"CAP_NET_BIND_SERVICE", "servers listen below port 1024"},
	{"CAP_NET_RAW", "ping"},
	{"CAP_SETFCAP", "package managers set file capabilities"},
	{"CAP_SETGID", "servers drop to their own group"},
	{"CAP_SETPCAP", "programs give up capabilities"},
	{"CAP_SETUID", "servers drop to their own user"},
	{"CAP_SYS_CHROOT", "servers confine themselves further"},
}

// knownCapabilities are all of Linux 6.x, in the kernel's order: CAP_CHOWN is 0.
var knownCapabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
	"CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
	"CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
	"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
	"CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
	"CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

// CanonicalCap gives the full name of a capability: CAP_NET_ADMIN for net_admin, ALL for all.
func CanonicalCap(name string) (string, error) {
	upper := strings.ToUpper(name)
	if upper == capAll || upper == "CAP_"+capAll {
		return capAll, nil
	}
	if !strings.HasPrefix(upper, "CAP_") {
		upper = "CAP_" + upper
	}
	if !slices.Contains(knownCapabilities, upper) {
		return "", spec.Errorf(spec.KindInvalid, "capability %q is unknown; see capabilities(7) for the names", name)
	}
	return upper, nil
}

// capabilitiesOf applies docker's rule: what is added or dropped by name counts more than ALL, and a capability both
// added and dropped is dropped. Nothing is inheritable or ambient, so a process that is not root has none after its
// execve unless the file grants them, which no_new_privs prevents.
func capabilitiesOf(add, drop []string) (*specs.LinuxCapabilities, error) {
	added, err := canonicalCaps("spec.cap_add", add)
	if err != nil {
		return nil, err
	}
	dropped, err := canonicalCaps("spec.cap_drop", drop)
	if err != nil {
		return nil, err
	}

	var set []string
	switch {
	case slices.Contains(added, capAll):
		set = slices.Clone(knownCapabilities)
	case !slices.Contains(dropped, capAll):
		for _, row := range defaultCapabilities {
			set = append(set, row.name)
		}
	}
	set = append(set, added...)
	set = slices.DeleteFunc(set, func(c string) bool { return c == capAll || slices.Contains(dropped, c) })
	slices.Sort(set)
	set = slices.Compact(set)
	return &specs.LinuxCapabilities{Bounding: set, Effective: slices.Clone(set), Permitted: slices.Clone(set)}, nil
}

func canonicalCaps(field string, names []string) ([]string, error) {
	out := make([]string, len(names))
	for i, name := range names {
		c, err := CanonicalCap(name)
		if err != nil {
			return nil, spec.Invalidf(field, "%w", err)
		}
		out[i] = c
	}
	return out, nil
}
