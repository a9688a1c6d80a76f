package client

import (
	"context"
	"errors"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	pipesHello   = "sandboxd-pipes/1"
	pipesNameLen = 16
	// pipesTimeout bounds the asking for pipes.
	pipesTimeout = 5 * time.Second
	// moveBytes is the most that is moved at once.
	moveBytes = 1 << 20
	// fullPoll is how long the output's end may be full before it is looked whether anybody still wants it.
	fullPoll = 200 // milliseconds
)

// askForPipes answers with nil where there are none to be had: then output comes through the call's stream.
func askForPipes(ctx context.Context, socket string) *pipes {
	if socket == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, pipesTimeout)
	defer cancel()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", socket)
	if err != nil {
		return nil // the call will say so
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	if _, err := conn.Write([]byte(pipesHello)); err != nil {
		return nil
	}
	p := &pipes{name: make([]byte, pipesNameLen)}
	control := make([]byte, unix.CmsgSpace(len(p.ends)*4))
	n, controlLen, _, _, err := conn.(*net.UnixConn).ReadMsgUnix(p.name, control) //nolint:forcetypeassert // of a "unix" dial
	if err != nil {
		return nil
	}
	fds := rightsOf(control[:controlLen])
	if n != pipesNameLen || len(fds) != len(p.ends) {
		for _, fd := range fds {
			_ = unix.Close(fd)
		}
		return nil
	}
	for i, fd := range fds {
		// This side's own: the process has the other ends, and their state is theirs.
		if err := unix.SetNonblock(fd, true); err != nil {
			_ = unix.Close(fd)
			continue
		}
		p.ends[i] = os.NewFile(uintptr(fd), "output")
	}
	if p.ends[0] == nil || p.ends[1] == nil {
		p.close()
		return nil
	}
	return p
}

func rightsOf(control []byte) (fds []int) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return nil
	}
	for _, m := range messages {
		if some, err := unix.ParseUnixRights(&m); err == nil {
			fds = append(fds, some...)
		}
	}
	return fds
}

// move has the kernel move output from a pipe to a file without a copy, until it ends (true). Where the kernel can't, or the
// file takes no more, it answers false, and nothing is lost: what comes next is to be read and written, by which a broken pipe
// does to this program what it does to others.
func (p *pipes) move(from, to *os.File) (done bool, err error) {
	source, err := from.SyscallConn()
	if err != nil {
		return false, nil
	}
	target, err := to.SyscallConn()
	if err != nil {
		return false, nil
	}
	for {
		p.await(from)
		var n int64
		var failed error
		full := false
		err := source.Read(func(fd uintptr) bool {
			n, failed = splice(int(fd), target)
			if errors.Is(failed, unix.EAGAIN) {
				full = readable(int(fd))
				return full
			}
			return true
		})
		switch {
		case err != nil:
			return true, nil // closed, or silent for too long
		case full:
			if !p.awaitRoom(target) {
				return true, nil
			}
		case failed != nil:
			return false, nil
		case n == 0:
			return true, nil
		}
	}
}

func splice(from int, target interface{ Control(func(uintptr)) error }) (n int64, err error) {
	controlErr := target.Control(func(to uintptr) {
		for {
			n, err = unix.Splice(from, nil, int(to), nil, moveBytes, unix.SPLICE_F_MOVE|unix.SPLICE_F_NONBLOCK)
			if !errors.Is(err, unix.EINTR) {
				return
			}
		}
	})
	return n, errors.Join(controlErr, err)
}

// readable reports whether there is output or the end of it: then it is the target that can't take it.
func readable(fd int) bool {
	polled := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(polled, 0)
	return err == nil && n > 0 && polled[0].Revents&(unix.POLLIN|unix.POLLHUP) != 0
}

// awaitRoom waits until a target that is full takes more; false when the pipes were closed meanwhile.
func (p *pipes) awaitRoom(target interface{ Control(func(uintptr)) error }) bool {
	for !p.closed.Load() {
		ready := true
		err := target.Control(func(fd uintptr) {
			n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}, fullPoll)
			ready = n > 0 || err != nil && !errors.Is(err, unix.EINTR)
		})
		if err != nil || ready {
			return true
		}
	}
	return false
}
