package vhostvsock

import "time"

// Bounds of everything that the guest, QEMU or the daemon can make grow.
const (
	// Connections of one guest: those that wait for the daemon, those joined, those whose last bytes are on their way to
	// the daemon. More are answered with a reset. An agent needs a few; a hostile guest gets no more than this many
	// buffers.
	maxConns = 256
	// Guest connections that wait for the daemon to connect. An agent keeps one.
	maxWaitingGuest = 32
	// Daemon connections that wait for the guest to connect. More wait in the socket's own backlog.
	maxWaitingHost = 64
	// Resets owed to the guest about connections that we do not have. At this many the guest's packets are left where
	// they are until it makes room for the answers.
	maxOwedResets = 256

	// What a guest may have under way to the daemon on one connection: the buffer we promise it. Allocated only when the
	// daemon is slower than the guest.
	bufAlloc = 128 << 10
	// The guest is told of room again when this much has been freed since it last heard.
	creditStep = bufAlloc / 4
	// Longest payload of one packet from the guest: Linux's VIRTIO_VSOCK_MAX_PKT_BUF_SIZE.
	maxPayload = 64 << 10
	// Receive buffers filled by one read from the daemon: sixteen of Linux's 4 KiB.
	maxRxBatch = 16

	// Descriptors of one ring. QEMU makes 128.
	maxQueueSize = 1024
	// Packets handled before the loop looks at its descriptors again, so that a busy guest can't keep QEMU's messages and
	// the daemon's connections waiting.
	turnBudget = 256

	// Regions of guest memory: VHOST_MEMORY_BASELINE_NREGIONS of vhost-user.
	maxRegions = 8
	// Longest vhost-user payload: a memory table of maxRegions, rounded up.
	maxMessage = 512

	// How long a guest may take to reset a connection after it was told that both directions are shut: Linux's
	// VSOCK_CLOSE_TIMEOUT. Then we reset it.
	closeTimeout = 8 * time.Second
	// How long the daemon may take to read what a guest that is gone had sent.
	drainTimeout = 800 * time.Millisecond
)
