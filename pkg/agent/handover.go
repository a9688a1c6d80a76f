package agent

import (
	"context"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// StartInto is Start for a process whose standard output and error are pipes of the caller's: output are their write ends,
// which are handed over to the agent. They stay the caller's to close. handed is false when an agent of an earlier version did
// not take them: then the process's output is to be read as ever.
func (c *Client) StartInto(ctx context.Context, containerID, processID string, p *specs.Process, stdin bool, output [spec.HandoverDescriptors]*os.File) (proc *Process, handed bool, err error) {
	if err := c.handOver(ctx, processID, output); err != nil {
		return nil, false, err
	}
	return c.start(ctx, containerID, processID, p, stdin, true)
}

// rightsWriter is what a Unix socket can do.
type rightsWriter interface {
	net.Conn
	WriteMsgUnix(b, oob []byte, addr *net.UnixAddr) (n, oobn int, err error)
}

// handOver sends descriptors to the agent, ahead of the call that they belong to.
func (c *Client) handOver(ctx context.Context, processID string, files [spec.HandoverDescriptors]*os.File) error {
	if gone := c.gone(); gone != nil {
		return gone
	}
	ctx, cancel := context.WithTimeout(ctx, dialLimit)
	defer cancel()
	conn, err := c.dial(ctx)
	if err != nil {
		return err
	}
	defer conn.Close()
	socket, ok := conn.(rightsWriter)
	if !ok {
		return spec.Errorf(spec.KindInternal, "cannot hand descriptors over: a %T carries none", conn)
	}
	if err := socket.SetWriteDeadline(time.Now().Add(writeLimit)); err != nil {
		return fmt.Errorf("cannot hand descriptors over: %w", err)
	}
	var fds [spec.HandoverDescriptors]int
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	message := append([]byte{spec.HandoverMark}, processID...)
	if _, _, err := socket.WriteMsgUnix(message, unix.UnixRights(fds[:]...), nil); err != nil {
		return spec.Errorf(spec.KindUnavailable, "cannot hand descriptors over to the sandbox's agent: %w", err)
	}
	return nil
}
