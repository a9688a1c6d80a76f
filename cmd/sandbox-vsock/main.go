// Command sandbox-vsock carries one microVM's vsock where the host's kernel can't. sandboxd starts one for each VM, in
// the VM's cgroup and with no more rights than QEMU has; it outlives the daemon and ends with QEMU.
//
//	sandbox-vsock --cid N --port P
//
// It has nothing but its descriptors: 3, a vhost-user socket whose other end is QEMU's; 4, a listening Unix socket that
// the daemon connects to; 2, for the one line it says when the guest or QEMU breaks the protocol.
//
// Exit codes: 0 when QEMU is gone, 1 on an error, 2 on a wrong command line.
package main

import (
	"flag"
	"fmt"
	"math"
	"os"
	"runtime"
	"runtime/debug"

	"github.com/sandboxd/sandboxd/pkg/vhostvsock"
)

const (
	controlFD  = 3
	listenerFD = 4

	// One goroutine does the work. There are as many of these processes as there are VMs, so each is kept small: one
	// processor, and a heap that is collected before it has grown by a quarter.
	maxProcs  = 1
	gcPercent = 25
)

func main() {
	cid := flag.Uint64("cid", 0, "the guest's context ID")
	port := flag.Uint64("port", 0, "the port at context ID 2 that the guest may connect to")
	flag.Parse()
	// 0 to 2 and 2^32-1 have a meaning of their own.
	if flag.NArg() != 0 || *cid < 3 || *cid >= math.MaxUint32 || *port == 0 || *port >= math.MaxUint32 {
		flag.Usage()
		os.Exit(2)
	}
	if err := run(uint32(*cid), uint32(*port)); err != nil {
		fmt.Fprintf(os.Stderr, "sandbox-vsock: %v\n", err)
		os.Exit(1)
	}
}

func run(cid, port uint32) error {
	runtime.GOMAXPROCS(maxProcs)
	debug.SetGCPercent(gcPercent)
	control, listener := os.NewFile(controlFD, "vhost-user"), os.NewFile(listenerFD, "listener")
	if err := confine(); err != nil {
		return err
	}
	return vhostvsock.Serve(vhostvsock.Config{CID: cid, Port: port, Control: control, Listener: listener})
}
