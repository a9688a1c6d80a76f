package oci

import (
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

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

// CanonicalCap gives the full name of a capability: CAP_NET_ADMIN for net_admin, ALL for all.
func CanonicalCap(name string) (string, error) { return spec.CanonicalCap(name) }

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
	case slices.Contains(added, spec.CapAll):
		set = slices.Clone(spec.Capabilities)
	case !slices.Contains(dropped, spec.CapAll):
		for _, row := range defaultCapabilities {
			set = append(set, row.name)
		}
	}
	set = append(set, added...)
	set = slices.DeleteFunc(set, func(c string) bool { return c == spec.CapAll || slices.Contains(dropped, c) })
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
