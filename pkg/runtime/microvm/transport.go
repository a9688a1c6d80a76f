package microvm

import (
	"context"
	"net"
	"os"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// transport carries connections between one guest's agent and the daemon. There are two: the kernel's vsock where the
// host has /dev/vhost-vsock (transport_kernel.go), and our vhost-user helper where it has not (transport_vhostuser.go).
// The guest sees no difference: it dials CID 2 at Record().Port. Templates and their clones have a virtio-serial port in
// the helper's place (transport_port.go).
//
// They are made by these functions, one pair a file:
//
//	newVhostUser(dir string, token bootToken) (transport, transportFiles, error)
//	attachVhostUser(dir string, rec transportRecord, token bootToken) (transport, error)
//	newKernelHub(stateDir string, log *zap.Logger) (*kernelHub, error) // one per Runtime; an error where the host can't
//	(*kernelHub).newTransport(token bootToken) (transport, transportFiles, error)
//	(*kernelHub).attach(rec transportRecord, token bootToken) (transport, error)
//	(*kernelHub).Close() error
//	newPort(dir string, token bootToken) (transport, transportFiles, error)
//	attachPort(dir string, rec transportRecord, token bootToken) *portTransport
//
// dir is the VM's own run directory, 0700 and root's, which exists; the listening socket is dir/vsock.sock. dir may be
// longer than a socket address holds: bind and connect through /proc/self/fd. A file of that name that is already
// there is an error at newVhostUser. Whoever removes the VM removes dir.
type transport interface {
	// Record is fixed, and is all that an attach needs besides the token. It is stored before QEMU starts.
	Record() transportRecord
	// Dial returns a connection whose preface was read and verified against the token, in constant time. It waits until
	// the guest dials, ctx is done, or Close. It may be called at any time, concurrently, before QEMU runs as well.
	Dial(ctx context.Context) (net.Conn, error)
	// Close ends waiting Dials with net.ErrClosed and frees what the daemon holds: sockets, goroutines, and, with the
	// kernel's vsock, the place of the CID in the hub. Connections given out stay open, but for a port's, which are part of one. It ends neither QEMU nor the
	// helper. Idempotent.
	Close() error
}

// Names of transports, as runtime.Facts shows them.
const (
	transportVhostUser = "vhost-user-vsock"
	transportKernel    = "vsock"
	transportPort      = "virtio-serial"
)

// adopter is a transport whose guest may be a template's clone, which has no token at first: the zero token stands for
// that. adopted says what its connections prove from then on.
type adopter interface{ adopted(token bootToken) }

// transportRecord is stored with a VM.
type transportRecord struct {
	// transportVhostUser or transportKernel.
	Name string `json:"name"`
	// The guest's context ID. With the kernel's vsock it is unique on the host and was reserved by
	// VHOST_VSOCK_SET_GUEST_CID on the descriptor that QEMU gets.
	CID uint32 `json:"cid"`
	// The port at CID 2 that the guest dials.
	Port uint32 `json:"port"`
}

// transportFiles are the ends that the VM's processes get. The caller of the constructor owns and closes them once the
// processes run, or when the start failed.
type transportFiles struct {
	// QEMU's: the connected vhost-user socket, the open /dev/vhost-vsock, or the port's listening socket.
	QEMU *os.File
	// The helper's from descriptor 3 on, in order (the other end of QEMU's socket, the listening Unix socket); nil with the
	// kernel's vsock, which needs no helper. The runtime starts the helper, in the VM's cgroup and confined like QEMU, with
	// the arguments --cid Record().CID --port Record().Port.
	Helper []*os.File
}

// close closes every file; nil ones are skipped.
func (f transportFiles) close() {
	for _, file := range append([]*os.File{f.QEMU}, f.Helper...) {
		if file != nil {
			_ = file.Close()
		}
	}
}

// bootToken is what a guest proves its boot with.
type bootToken = [spec.TokenLen]byte
