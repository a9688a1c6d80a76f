package vhostvsock

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"
)

// The rings that QEMU hands over. It keeps the third one, for events, to itself.
const (
	rxQueue   = 0 // to the guest
	txQueue   = 1 // from the guest
	numQueues = 2
)

// Device features, virtio's and vhost-user's.
const (
	featIndirect         = 1 << 28 // halves what a small packet costs the guest
	featEventIdx         = 1 << 29 // fewer kicks and interrupts
	featProtocolFeatures = 1 << 30 // vhost-user's own, below
	featVersion1         = 1 << 32 // little-endian, modern layout

	deviceFeatures = featIndirect | featEventIdx | featProtocolFeatures | featVersion1
)

// vhost-user's own features.
const (
	protoMQ       = 1 << 0 // QEMU asks how many queues there are
	protoReplyAck = 1 << 3 // QEMU may wait until a message was acted on
	protoConfig   = 1 << 9 // the guest's CID is asked of us; vhost-user-vsock-device doesn't start without

	protocolFeatures = protoMQ | protoReplyAck | protoConfig
)

// Bits of SET_VRING_KICK and its like.
const (
	vringIndexMask = 0xff
	vringNoFD      = 0x100
)

// request is how one kind of message is served.
type request struct {
	// Payload bytes, at least and at most.
	min, max int
	// Descriptors, at most.
	fds int
	// reply is sent if not nil. Descriptors that it keeps it takes out of m.fds.
	serve func(d *Device, m *message) (reply []byte, err error)
}

// requests are the messages we take; any other one ends the device.
var requests = map[uint32]request{
	reqGetFeatures:         {0, 0, 0, func(*Device, *message) ([]byte, error) { return u64(deviceFeatures), nil }},
	reqSetFeatures:         {8, 8, 0, (*Device).setFeatures},
	reqGetProtocolFeatures: {0, 0, 0, func(*Device, *message) ([]byte, error) { return u64(protocolFeatures), nil }},
	reqSetProtocolFeatures: {8, 8, 0, (*Device).setProtocolFeatures},
	reqGetQueueNum:         {0, 0, 0, func(*Device, *message) ([]byte, error) { return u64(numQueues), nil }},
	reqSetOwner:            {0, 0, 0, func(*Device, *message) ([]byte, error) { return nil, nil }},
	reqResetOwner:          {0, 0, 0, (*Device).resetOwner},
	reqGetConfig:           {12, maxMessage, 0, (*Device).getConfig},
	reqSetMemTable:         {8 + 32, 8 + 32*maxRegions, maxRegions, (*Device).setMemTable},
	reqSetVringNum:         {8, 8, 0, (*Device).setVringNum},
	reqSetVringAddr:        {40, 40, 0, (*Device).setVringAddr},
	reqSetVringBase:        {8, 8, 0, (*Device).setVringBase},
	reqGetVringBase:        {8, 8, 0, (*Device).getVringBase},
	reqSetVringEnable:      {8, 8, 0, (*Device).setVringEnable},
	reqSetVringKick:        {8, 8, 1, (*Device).setVringKick},
	reqSetVringCall:        {8, 8, 1, (*Device).setVringCall},
	// We end rather than report through it.
	reqSetVringErr: {8, 8, 1, func(*Device, *message) ([]byte, error) { return nil, nil }},
}

// handleMessage serves one message, whose descriptors it closes.
func (d *Device) handleMessage(m *message) error {
	defer func() { closeAll(m.fds) }()
	r, ok := requests[m.request]
	switch {
	case !ok:
		return fmt.Errorf("vhost-user request %d is not one we know", m.request)
	case m.flags&messageVersionMask != messageVersion || m.flags&messageReply != 0:
		return fmt.Errorf("vhost-user request %d has flags %#x", m.request, m.flags)
	case len(m.payload) < r.min || len(m.payload) > r.max:
		return fmt.Errorf("vhost-user request %d has %d bytes, want %d to %d", m.request, len(m.payload), r.min, r.max)
	case len(m.fds) > r.fds:
		return fmt.Errorf("vhost-user request %d has %d descriptors, at most %d", m.request, len(m.fds), r.fds)
	}
	answer, err := r.serve(d, m)
	if err != nil {
		return fmt.Errorf("vhost-user request %d: %w", m.request, err)
	}
	if answer == nil && d.protocol&protoReplyAck != 0 && m.flags&messageNeedReply != 0 {
		answer = u64(0)
	}
	if answer == nil {
		return nil
	}
	return reply(d.control, m.request, answer)
}

func u64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

func (m *message) u64(at int) uint64 { return binary.LittleEndian.Uint64(m.payload[at:]) }
func (m *message) u32(at int) uint32 { return binary.LittleEndian.Uint32(m.payload[at:]) }

func (d *Device) setFeatures(m *message) ([]byte, error) {
	f := m.u64(0)
	if f&^deviceFeatures != 0 {
		return nil, fmt.Errorf("features %#x, of which we offered %#x", f, uint64(deviceFeatures))
	}
	for i := range d.queues {
		q := &d.queues[i]
		q.eventIdx = f&featEventIdx != 0
		q.indirect = f&featIndirect != 0
		// Without vhost-user's own features a ring is enabled from its kick descriptor on.
		if f&featProtocolFeatures == 0 {
			q.enabled = true
		}
	}
	return nil, nil
}

func (d *Device) setProtocolFeatures(m *message) ([]byte, error) {
	d.protocol = m.u64(0)
	if d.protocol&^protocolFeatures != 0 {
		return nil, fmt.Errorf("protocol features %#x, of which we offered %#x", d.protocol, uint64(protocolFeatures))
	}
	return nil, nil
}

func (d *Device) resetOwner(*message) ([]byte, error) {
	for i := range d.queues {
		d.stopQueue(&d.queues[i])
	}
	return nil, nil
}

// getConfig returns a piece of struct virtio_vsock_config, which is the guest's CID.
func (d *Device) getConfig(m *message) ([]byte, error) {
	config := u64(d.cid)
	offset, size := m.u32(0), m.u32(4)
	if uint64(offset)+uint64(size) > uint64(len(config)) {
		// A reply of no length says that there is no such piece.
		return append(binary.LittleEndian.AppendUint32(nil, offset), make([]byte, 8)...), nil
	}
	answer := append([]byte{}, m.payload[:12]...)
	return append(answer, config[offset:offset+size]...), nil
}

func (d *Device) setMemTable(m *message) ([]byte, error) {
	n := int(m.u32(0))
	if n > maxRegions || len(m.payload) < 8+32*n {
		return nil, fmt.Errorf("memory table of %d regions in %d bytes", n, len(m.payload))
	}
	descs := make([]regionDesc, n)
	for i := range descs {
		at := 8 + 32*i
		descs[i] = regionDesc{guest: m.u64(at), size: m.u64(at + 8), user: m.u64(at + 16), offset: m.u64(at + 24)}
	}
	mem, err := mapMemory(descs, m.fds)
	if err != nil {
		return nil, err
	}
	if d.mem != nil {
		d.mem.unmap()
	}
	d.mem = mem
	for i := range d.queues {
		if err := d.queues[i].resolve(mem); err != nil {
			return nil, fmt.Errorf("queue %d: %w", i, err)
		}
	}
	return nil, nil
}

// queueOf finds the queue that a message speaks of.
func (d *Device) queueOf(index uint32) (*queue, error) {
	if index >= numQueues {
		return nil, fmt.Errorf("there is no queue %d", index)
	}
	return &d.queues[index], nil
}

func (d *Device) setVringNum(m *message) ([]byte, error) {
	q, err := d.queueOf(m.u32(0))
	if err != nil {
		return nil, err
	}
	n := m.u32(4)
	if n == 0 || n > maxQueueSize || n&(n-1) != 0 {
		return nil, fmt.Errorf("queue of %d descriptors, want a power of two up to %d", n, maxQueueSize)
	}
	q.size = uint16(n)
	return nil, q.resolve(d.mem)
}

func (d *Device) setVringAddr(m *message) ([]byte, error) {
	q, err := d.queueOf(m.u32(0))
	if err != nil {
		return nil, err
	}
	if flags := m.u32(4); flags != 0 {
		return nil, fmt.Errorf("ring flags %#x, want none", flags)
	}
	q.descUser, q.usedUser, q.availUser = m.u64(8), m.u64(16), m.u64(24)
	q.addressed = true
	return nil, q.resolve(d.mem)
}

func (d *Device) setVringBase(m *message) ([]byte, error) {
	q, err := d.queueOf(m.u32(0))
	if err != nil {
		return nil, err
	}
	base := m.u32(4)
	if base > 0xffff {
		return nil, fmt.Errorf("ring index %d", base)
	}
	// QEMU gives back the index that it got at the stop unless the guest's driver started anew, which forgot every
	// connection then.
	if uint16(base) != q.nextAvail {
		d.forgetConns()
	}
	q.nextAvail = uint16(base)
	return nil, nil
}

// getVringBase stops a ring and says how far we came.
func (d *Device) getVringBase(m *message) ([]byte, error) {
	index := m.u32(0)
	q, err := d.queueOf(index)
	if err != nil {
		return nil, err
	}
	if index == txQueue {
		if err := d.transmitAll(); err != nil {
			return nil, err
		}
	}
	d.stopQueue(q)
	answer := binary.LittleEndian.AppendUint32(nil, index)
	return binary.LittleEndian.AppendUint32(answer, uint32(q.nextAvail)), nil
}

// stopQueue keeps what a restart continues from.
func (d *Device) stopQueue(q *queue) {
	d.dropKick(q)
	q.addressed = false
	_ = q.resolve(nil) // of nothing, which can't fail
}

// dropKick takes the descriptor out of the epoll by hand: QEMU has the same eventfd open, so closing ours doesn't.
func (d *Device) dropKick(q *queue) {
	if q.kick < 0 {
		return
	}
	_ = unix.EpollCtl(d.epoll, unix.EPOLL_CTL_DEL, q.kick, nil)
	_ = unix.Close(q.kick)
	q.kick = -1
}

func (d *Device) setVringEnable(m *message) ([]byte, error) {
	q, err := d.queueOf(m.u32(0))
	if err != nil {
		return nil, err
	}
	q.enabled = m.u32(4) != 0
	return nil, nil
}

func (d *Device) setVringKick(m *message) ([]byte, error) {
	index, fd, err := vringFD(m)
	if err != nil {
		return nil, err
	}
	q, err := d.queueOf(index)
	if err != nil {
		_ = closeFD(fd)
		return nil, err
	}
	if fd < 0 {
		return nil, fmt.Errorf("queue %d without a kick descriptor: polling is not served", index)
	}
	d.dropKick(q)
	q.kick = fd
	if err := d.watch(fd, watchKick, int32(index), unix.EPOLLIN); err != nil {
		return nil, fmt.Errorf("cannot watch the kick descriptor of queue %d: %w", index, err)
	}
	return nil, nil
}

func (d *Device) setVringCall(m *message) ([]byte, error) {
	index, fd, err := vringFD(m)
	if err != nil {
		return nil, err
	}
	q, err := d.queueOf(index)
	if err != nil {
		_ = closeFD(fd)
		return nil, err
	}
	if fd >= 0 {
		// A write must never wait for QEMU.
		if err := unix.SetNonblock(fd, true); err != nil {
			_ = closeFD(fd)
			return nil, fmt.Errorf("cannot make a call descriptor non-blocking: %w", err)
		}
	}
	_ = closeFD(q.call)
	q.call = fd
	return nil, nil
}

// vringFD takes the descriptor out of a message about one; -1 if it carries none on purpose.
func vringFD(m *message) (index uint32, fd int, err error) {
	v := m.u64(0)
	if v&^(vringIndexMask|vringNoFD) != 0 {
		return 0, -1, fmt.Errorf("bits %#x", v)
	}
	if v&vringNoFD != 0 {
		return uint32(v & vringIndexMask), -1, nil
	}
	if len(m.fds) != 1 {
		return 0, -1, fmt.Errorf("%d descriptors, want one", len(m.fds))
	}
	fd, m.fds = m.fds[0], nil
	return uint32(v & vringIndexMask), fd, nil
}

func closeFD(fd int) error {
	if fd < 0 {
		return nil
	}
	return unix.Close(fd)
}
