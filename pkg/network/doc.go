// Package network joins sandboxes to CNI networks: it runs the plugins of a conflist on a sandbox's network namespace, and
// takes back everything they did, whoever dies at whatever moment.
//
//	Attach: record ─▶ pin ─▶ plugins ADD ─▶ look at the interface ─▶ record with the result
//	Detach: wait for plugins of a daemon that died ─▶ plugins DEL ─▶ unpin ─▶ remove the record
//
// The record is on the disk before anything else is made and goes after everything else is gone, so a daemon that comes back
// finds in it all that may be there. It holds the conflist as it was at ADD: DEL gets the same one, whatever the operator made
// of the file meanwhile.
//
// The pin is a bind mount of the namespace below the run directory. Plugins delete an interface, and what they noted about
// its addresses elsewhere (masquerading rules), only while they can enter the namespace, which without the pin would end with
// its last process. It goes with the host's boot, and so does what it is needed for; leases, which outlive a boot, are
// given back without it.
//
// Plugins are programs of the operator's that run as root: they and the conflists must belong to root and be writable by
// nobody else. Even so a plugin is given only so much time and so many bytes of answer, and no environment of the daemon's.
package network
