package oci

// guardedPath is a path of /proc or /sys that the sandbox sees less of than the kernel would show.
type guardedPath struct {
	path, reason string
}

// maskedPaths are hidden: an empty file or directory lies over each. They are docker's. In a user namespace most of them
// are beyond root's reach anyway; a mask also holds where the kernel checks nothing.
var maskedPaths = []guardedPath{
	{"/proc/acpi", "host hardware state"},
	{"/proc/asound", "host sound devices: /proc/asound has leaked what is played"},
	{"/proc/interrupts", "interrupt counts tell keystrokes and other tenants' work"},
	{"/proc/kcore", "the kernel's memory"},
	{"/proc/keys", "keyrings are not divided by namespace"},
	{"/proc/latency_stats", "names of other tenants' processes"},
	{"/proc/timer_list", "kernel addresses and other tenants' processes"},
	{"/proc/timer_stats", "other tenants' processes, on old kernels"},
	{"/proc/sched_debug", "other tenants' processes, on old kernels"},
	{"/proc/scsi", "writing here removes the host's disks"},
	{"/sys/devices/virtual/powercap", "energy counters tell what other tenants compute (CVE-2020-8694)"},
	{"/sys/firmware", "firmware tables of the host"},
}

// readonlyPaths can be read but not changed, whatever capabilities the process has.
var readonlyPaths = []guardedPath{
	{"/proc/bus", "devices of the host"},
	{"/proc/fs", "settings of the host's file systems"},
	{"/proc/irq", "which processor serves which interrupt"},
	{"/proc/sys", "kernel settings, of which not all know namespaces"},
	{"/proc/sysrq-trigger", "reboots the host"},
}

func pathsOf(table []guardedPath) []string {
	out := make([]string, len(table))
	for i, row := range table {
		out[i] = row.path
	}
	return out
}
