// Package container builds the wall of namespaces: sandbox-agent as PID 1 of new user, pid, mount, net, ipc, uts and
// cgroup namespaces, in a cgroup of its own from its clone on, with ids of its own.
//
//	daemon                                              agent
//	│ run directory, record, id range, cgroup, socket
//	├─ fork+exec of the sealed memfd ──────────────────▶ boots, waits on its boot socket
//	│ writable layer, overlay over the EROFS image      │
//	├─ boot message: root mount, listening socket ─────▶ serves
//	◀────────────────────────────────────── BootResult ─┤
//	│ record says ready                                 │
//
// Nothing of it appears in the host's mount table, and the daemon may die at any point: until the record says ready the
// sandbox is half-made, and Remove (by id) undoes whatever exists of it.
//
// On the host a sandbox is:
//
//	<run-dir>/container/<id>/record.json     what was made, for the next daemon
//	<run-dir>/container/<id>/agent.sock      where Dial connects to
//	<state-dir>/sandbox/<id>/disk.ext4       the writable layer, on a loop device while the sandbox runs
//	<id range directory>/<base> -> <id>
//	cgroup <parent>/<id>, in each hierarchy
//	the agent's process and its children
package container
