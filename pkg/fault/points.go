//go:build sandboxd_fault

package fault

// Behind which walls a point is come to. What both have in common is tried behind each.
const (
	both      = "both"
	container = "container"
	vm        = "vm"
	// neither is what the daemon does without any workload.
	neither = "neither"
)

// points are all there are, by the place that has them, in the order in which they are come to. The crash suite dies at each:
// one that it does not come to fails it, as one does that has no row.
var points = []struct {
	place string
	wall  string
	steps []string
}{
	// pkg/workload: what a record says, before and after it is written.
	{"record", both, []string{
		"before created", "created written", "created synced",
		"before starting", "starting", "before running", "running", "before paused", "paused",
		"before stopping", "stopping", "before exited", "exited", "before failed", "failed", "before deleting", "deleting",
		"synced", "before gone", "gone",
	}},
	{"journal", neither, []string{"written anew", "named"}},
	{"output", both, []string{"made", "appended", "oldest removed"}},
	{"start", both, []string{"earlier sandbox taken down", "sandbox stands", "joined", "configured", "container created", "process started"}},
	{"exec", both, []string{"process started", "ended", "released"}},
	{"copy", both, []string{"into", "out of"}},
	{"pause", both, []string{"frozen", "thawed"}},
	{"snapshot", vm, []string{"recorded", "taken", "ready", "record removed"}},
	{"restore", vm, []string{"created", "sandbox stands", "renamed", "thawed"}},
	{"update", both, []string{"recorded", "applied"}},
	{"stop", both, []string{"asked to end", "killed"}},
	{"end", both, []string{"seen", "output complete", "shut down", "released"}},
	{"delete", both, []string{"asked for", "walls killed", "sandbox removed", "network left", "output removed"}},
	{"recover", both, []string{"strays removed", "attached", "stilled", "adopted", "taken down"}},

	// pkg/runtime/container.
	{"container start", container, []string{
		"directory made", "record", "writable layer", "ids", "unified cgroup", "fork", "cgroup", "socket", "namespaces", "identity", "apparmor", "root file system", "agent",
		"layer there", "layer on a loop device", "image mounted", "layers attached", "known", "agent has its root",
	}},
	{"container from the pool", container, []string{"made", "prepared", "directory named", "layer named"}},
	{"container end", container, []string{
		"begun", "killed", "ended", "reaped", "processes and cgroup", "layer", "ids", "layer deleted", "record", "layer withdrawn",
	}},

	// pkg/runtime/microvm.
	{"vm start", vm, []string{
		"directory made", "transport made", "recorded", "ids", "cgroup", "work directory", "layer",
		"network card", "helper runs", "QEMU runs", "processes recorded", "agent heard",
	}},
	{"vm template", vm, []string{"guest stands", "taken", "memory written", "kept"}},
	{"vm from the pool", vm, []string{"made", "directory named", "layer named", "goes on", "recorded"}},
	{"vm end", vm, []string{"begun", "cgroup deleted", "processes ended", "ids", "layer deleted", "directory removed"}},
	{"vm snapshot", vm, []string{"frozen", "stopped", "memory copied", "disk copied", "goes on", "to thaw"}},
	{"vm guest", vm, []string{"half written", "kernel written"}},

	// What both stand on.
	{"cgroup", both, []string{"made", "directory removed", "updated"}},
	{"layer", both, []string{"directory made", "marked", "copied", "template formatted"}},
	{"network", both, []string{"directory made", "recorded", "pinned", "added", "result recorded", "deleted", "unpinned"}},
	{"image", neither, []string{
		"received", "layer unpacked", "file written", "file named", "recorded", "removed from the records", "file removed",
	}},
}
