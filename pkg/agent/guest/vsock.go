package guest

import (
	"context"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// dialHost returns a dial function to a vsock port of the host. A connection is a plain file with a net.Conn's face.
func dialHost(port uint32) func(context.Context) (net.Conn, error) {
	address := vsockAddr{unix.VMADDR_CID_HOST, port}
	return func(context.Context) (net.Conn, error) {
		fd, err := unix.Socket(unix.AF_VSOCK, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("cannot make a vsock socket: %w", err)
		}
		// Blocking, on a thread of its own; the kernel gives up after two seconds.
		if err := unix.Connect(fd, &unix.SockaddrVM{CID: address.cid, Port: address.port}); err != nil {
			unix.Close(fd)
			return nil, fmt.Errorf("cannot dial %v: %w", address, err)
		}
		file, err := pollable(fd, address.String())
		if err != nil {
			return nil, err
		}
		return &vsockConn{file, address}, nil
	}
}

type vsockConn struct {
	*os.File
	remote vsockAddr
}

func (c *vsockConn) LocalAddr() net.Addr  { return vsockAddr{unix.VMADDR_CID_ANY, unix.VMADDR_PORT_ANY} }
func (c *vsockConn) RemoteAddr() net.Addr { return c.remote }

type vsockAddr struct{ cid, port uint32 }

func (vsockAddr) Network() string  { return "vsock" }
func (a vsockAddr) String() string { return fmt.Sprintf("%d:%d", a.cid, a.port) }
