// Package vhostvsock carries a virtual machine's vsock without help from the host's kernel. It is the back end of QEMU's
// vhost-user-vsock-device: it serves the device's two rings in the guest's memory and joins each connection that the
// guest opens to (CID 2, one port), once it has sent a byte on it, with a connection that the daemon opens to a Unix
// socket.
//
//	guest ── rings in shared memory ── Device ── Unix socket ── daemon
//	QEMU  ── vhost-user messages ─────────┘
//
// One goroutine does it all around one epoll, so nothing is locked. Its files: message.go and session.go speak
// vhost-user with QEMU; memory.go and queue.go reach into the guest's memory; packet.go, conn.go, receive.go and
// transmit.go are the vsock protocol; device.go is the loop.
//
// The guest is hostile and so may be QEMU. Whatever is read from the guest's memory or from a message is copied first,
// then checked. A broken ring or message ends Serve with an error: it breaks that machine's own vsock and nothing else. A
// broken packet resets the connection it belongs to. Every queue has a bound, see limits.go.
//
// Sources: the vhost-user protocol (docs/interop/vhost-user.rst of QEMU) and virtio 1.2, sections 2.7 (split
// virtqueues) and 5.10 (socket device).
package vhostvsock
