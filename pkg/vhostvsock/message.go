package vhostvsock

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Requests of QEMU's (vhost-user.rst, "Front-end message types").
const (
	reqGetFeatures         = 1
	reqSetFeatures         = 2
	reqSetOwner            = 3
	reqResetOwner          = 4
	reqSetMemTable         = 5
	reqSetVringNum         = 8
	reqSetVringAddr        = 9
	reqSetVringBase        = 10
	reqGetVringBase        = 11
	reqSetVringKick        = 12
	reqSetVringCall        = 13
	reqSetVringErr         = 14
	reqGetProtocolFeatures = 15
	reqSetProtocolFeatures = 16
	reqGetQueueNum         = 17
	reqSetVringEnable      = 18
	reqGetConfig           = 24
)

const (
	messageHeaderLen = 12

	messageVersion     = 1
	messageVersionMask = 3
	messageReply       = 4
	messageNeedReply   = 8
)

// message is one request with what came with it. Its descriptors are the receiver's to close.
type message struct {
	request, flags uint32
	payload        []byte
	fds            []int
}

// messageReader puts messages together. It never reads past the end of one, so that descriptors stay with theirs.
type messageReader struct {
	fd  int
	buf [messageHeaderLen + maxMessage]byte
	n   int
	fds []int
}

// errEOF: QEMU has closed its end between two messages.
var errEOF = errors.New("the vhost-user socket is closed")

// next returns a message, or unix.EAGAIN if no whole one has arrived. Its payload is valid until the next call.
func (r *messageReader) next() (*message, error) {
	want := messageHeaderLen
	if r.n >= messageHeaderLen {
		want += int(binary.LittleEndian.Uint32(r.buf[8:])) // checked when the header was complete
	}
	for {
		if r.n < want {
			n, err := r.receive(r.buf[r.n:want])
			if err != nil {
				return nil, err
			}
			if n == 0 && r.n == 0 {
				return nil, errEOF
			}
			if n == 0 {
				return nil, fmt.Errorf("the vhost-user socket was closed within a message")
			}
			r.n += n
		}
		if r.n < want {
			continue
		}
		if want == messageHeaderLen {
			size := binary.LittleEndian.Uint32(r.buf[8:])
			if size > maxMessage {
				return nil, fmt.Errorf("vhost-user message of %d bytes, at most %d", size, maxMessage)
			}
			if size > 0 {
				want += int(size)
				continue
			}
		}
		m := &message{
			request: binary.LittleEndian.Uint32(r.buf[0:]),
			flags:   binary.LittleEndian.Uint32(r.buf[4:]),
			payload: r.buf[messageHeaderLen:want],
			fds:     r.fds,
		}
		r.n, r.fds = 0, nil
		return m, nil
	}
}

func (r *messageReader) receive(b []byte) (int, error) {
	oob := make([]byte, unix.CmsgSpace(4*maxRegions))
	for {
		n, oobn, flags, _, err := unix.Recvmsg(r.fd, b, oob, unix.MSG_CMSG_CLOEXEC|unix.MSG_DONTWAIT)
		if err == unix.EINTR {
			continue
		}
		if err == unix.EAGAIN {
			return 0, err
		}
		if err == unix.ECONNRESET {
			return 0, nil // QEMU was killed with something of ours unread
		}
		if err != nil {
			return 0, fmt.Errorf("cannot read from the vhost-user socket: %w", err)
		}
		fds, err := rights(oob[:oobn])
		r.fds = append(r.fds, fds...)
		if err != nil {
			return 0, err
		}
		if flags&unix.MSG_CTRUNC != 0 || len(r.fds) > maxRegions {
			return 0, fmt.Errorf("vhost-user message with more than %d descriptors", maxRegions)
		}
		return n, nil
	}
}

func rights(oob []byte) ([]int, error) {
	if len(oob) == 0 {
		return nil, nil
	}
	cmsgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("cannot parse descriptors of a vhost-user message: %w", err)
	}
	var fds []int
	for i := range cmsgs {
		got, err := unix.ParseUnixRights(&cmsgs[i])
		if err != nil {
			continue // not descriptors: of no use to us
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

// close closes descriptors of a message that is not complete.
func (r *messageReader) close() { closeAll(r.fds); r.fds = nil }

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// reply answers a request. QEMU waits for it, so a full socket means that it doesn't speak vhost-user.
func reply(fd int, request uint32, payload []byte) error {
	b := make([]byte, messageHeaderLen, messageHeaderLen+len(payload))
	binary.LittleEndian.PutUint32(b[0:], request)
	binary.LittleEndian.PutUint32(b[4:], messageVersion|messageReply)
	binary.LittleEndian.PutUint32(b[8:], uint32(len(payload)))
	b = append(b, payload...)
	for {
		n, err := unix.SendmsgN(fd, b, nil, nil, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch {
		case err == unix.EINTR:
		case err == unix.EPIPE || err == unix.ECONNRESET:
			return nil // the next read says so too
		case err != nil:
			return fmt.Errorf("cannot answer a vhost-user message: %w", err)
		case n != len(b):
			return fmt.Errorf("cannot answer a vhost-user message: the socket took %d bytes of %d", n, len(b))
		default:
			return nil
		}
	}
}
