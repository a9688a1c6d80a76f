package spec

import (
	"slices"
	"strings"
)

// CapAll stands for every capability, in a request to add or drop.
const CapAll = "ALL"

// Capabilities are all of Linux 6.x, in the kernel's order: the index is the number, CAP_CHOWN is 0.
var Capabilities = []string{
	"CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_DAC_READ_SEARCH", "CAP_FOWNER", "CAP_FSETID", "CAP_KILL", "CAP_SETGID",
	"CAP_SETUID", "CAP_SETPCAP", "CAP_LINUX_IMMUTABLE", "CAP_NET_BIND_SERVICE", "CAP_NET_BROADCAST", "CAP_NET_ADMIN",
	"CAP_NET_RAW", "CAP_IPC_LOCK", "CAP_IPC_OWNER", "CAP_SYS_MODULE", "CAP_SYS_RAWIO", "CAP_SYS_CHROOT",
	"CAP_SYS_PTRACE", "CAP_SYS_PACCT", "CAP_SYS_ADMIN", "CAP_SYS_BOOT", "CAP_SYS_NICE", "CAP_SYS_RESOURCE",
	"CAP_SYS_TIME", "CAP_SYS_TTY_CONFIG", "CAP_MKNOD", "CAP_LEASE", "CAP_AUDIT_WRITE", "CAP_AUDIT_CONTROL",
	"CAP_SETFCAP", "CAP_MAC_OVERRIDE", "CAP_MAC_ADMIN", "CAP_SYSLOG", "CAP_WAKE_ALARM", "CAP_BLOCK_SUSPEND",
	"CAP_AUDIT_READ", "CAP_PERFMON", "CAP_BPF", "CAP_CHECKPOINT_RESTORE",
}

// CanonicalCap gives the full name of a capability: CAP_NET_ADMIN for net_admin, CapAll for all.
func CanonicalCap(name string) (string, error) {
	upper := strings.ToUpper(name)
	if upper == CapAll || upper == "CAP_"+CapAll {
		return CapAll, nil
	}
	if !strings.HasPrefix(upper, "CAP_") {
		upper = "CAP_" + upper
	}
	if !slices.Contains(Capabilities, upper) {
		return "", Errorf(KindInvalid, "capability %q is unknown; see capabilities(7) for the names", name)
	}
	return upper, nil
}
