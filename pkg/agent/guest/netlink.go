package guest

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// netlink is a conversation with the kernel about interfaces, addresses and routes (rtnetlink(7)): one request, one
// acknowledgement. The libraries for it are larger than all the agent says.
type netlink struct {
	fd       int
	sequence uint32
}

// maxNetlinkAnswer is more than an acknowledgement, which holds the request.
const maxNetlinkAnswer = 16 << 10

func openNetlink() (*netlink, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("cannot open netlink: %w", err)
	}
	return &netlink{fd: fd}, nil
}

func (k *netlink) close() { _ = unix.Close(k.fd) }

// attributes are what follows a message's fixed part, each at a multiple of four.
type attributes []byte

func (a *attributes) add(kind uint16, value []byte) {
	const header = 4
	*a = binary.NativeEndian.AppendUint16(*a, uint16(header+len(value)))
	*a = binary.NativeEndian.AppendUint16(*a, kind)
	*a = append(*a, value...)
	for len(*a)%4 != 0 {
		*a = append(*a, 0)
	}
}

func (a *attributes) addUint32(kind uint16, value uint32) {
	a.add(kind, binary.NativeEndian.AppendUint32(nil, value))
}

// request sends a message and waits for its acknowledgement.
func (k *netlink) request(kind, flags uint16, fixed []byte, a attributes) error {
	k.sequence++
	m := binary.NativeEndian.AppendUint32(nil, uint32(unix.NLMSG_HDRLEN+len(fixed)+len(a)))
	m = binary.NativeEndian.AppendUint16(m, kind)
	m = binary.NativeEndian.AppendUint16(m, flags|unix.NLM_F_REQUEST|unix.NLM_F_ACK)
	m = binary.NativeEndian.AppendUint32(m, k.sequence)
	m = binary.NativeEndian.AppendUint32(m, 0)
	m = append(append(m, fixed...), a...)
	if err := unix.Sendto(k.fd, m, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, maxNetlinkAnswer)
	size, _, err := unix.Recvfrom(k.fd, answer, 0)
	if err != nil {
		return err
	}
	return acknowledged(answer[:size], k.sequence)
}

// acknowledged reads struct nlmsghdr and the error code after it, negative or 0.
func acknowledged(answer []byte, sequence uint32) error {
	if len(answer) < unix.NLMSG_HDRLEN+4 || binary.NativeEndian.Uint16(answer[4:]) != unix.NLMSG_ERROR ||
		binary.NativeEndian.Uint32(answer[8:]) != sequence {
		return errors.New("the kernel's answer is no acknowledgement")
	}
	if code := int32(binary.NativeEndian.Uint32(answer[unix.NLMSG_HDRLEN:])); code != 0 {
		return unix.Errno(-code)
	}
	return nil
}
