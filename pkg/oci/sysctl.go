package oci

// sysctls are set in the sandbox before /proc/sys becomes read-only: docker's. Both are of the network namespace, or the
// guest kernel, and stand in for capabilities that a process that is not root lacks.
var sysctls = []struct{ name, value, reason string }{
	{"net.ipv4.ip_unprivileged_port_start", "0", "servers that are not root listen below port 1024"},
	{"net.ipv4.ping_group_range", "0 65535", "ping without CAP_NET_RAW; every group a sandbox's user namespace has"},
}

func sysctlsOf() map[string]string {
	out := make(map[string]string, len(sysctls))
	for _, row := range sysctls {
		out[row.name] = row.value
	}
	return out
}
