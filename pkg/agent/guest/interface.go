package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// setUp makes the guest's one network card what the daemon says that the sandbox has. The order is the kernel's: a card changes
// its name and hardware address while it is down, and takes routes when it has addresses.
func (n *network) setUp() error {
	card, err := findCard()
	if err != nil {
		return err
	}
	kernel, err := openNetlink()
	if err != nil {
		return err
	}
	defer kernel.close()
	index := int32(card.Index)
	if err := kernel.setLink(index, n); err != nil {
		return fmt.Errorf("cannot set %s up: %w", card.Name, err)
	}
	for _, a := range n.addresses {
		if err := kernel.addAddress(index, a); err != nil {
			return fmt.Errorf("cannot add address %v: %w", a, err)
		}
	}
	for _, r := range n.routes {
		if err := kernel.addRoute(index, r); err != nil {
			return fmt.Errorf("cannot add the route to %v: %w", r.destination, err)
		}
	}
	return nil
}

// findCard finds the only interface that is more than loopback.
func findCard() (net.Interface, error) {
	all, err := net.Interfaces()
	if err != nil {
		return net.Interface{}, fmt.Errorf("cannot list interfaces: %w", err)
	}
	var found []net.Interface
	for _, i := range all {
		if i.Flags&net.FlagLoopback == 0 && len(i.HardwareAddr) == macLen {
			found = append(found, i)
		}
	}
	if len(found) != 1 {
		return net.Interface{}, fmt.Errorf("the guest has %d network cards, not one", len(found))
	}
	return found[0], nil
}

// setLink renames the card, gives it its addresses on the link and brings it up.
func (k *netlink) setLink(index int32, n *network) error {
	var a attributes
	a.add(unix.IFLA_IFNAME, append([]byte(n.ifName), 0))
	if len(n.mac) > 0 {
		a.add(unix.IFLA_ADDRESS, n.mac)
	}
	if n.mtu > 0 {
		a.addUint32(unix.IFLA_MTU, n.mtu)
	}
	if err := k.request(unix.RTM_NEWLINK, 0, linkMessage(index, 0, 0), a); err != nil {
		return err
	}
	return k.request(unix.RTM_NEWLINK, 0, linkMessage(index, unix.IFF_UP, unix.IFF_UP), nil)
}

// linkMessage is struct ifinfomsg.
func linkMessage(index int32, flags, change uint32) []byte {
	m := []byte{unix.AF_UNSPEC, 0, 0, 0}
	m = binary.NativeEndian.AppendUint32(m, uint32(index))
	m = binary.NativeEndian.AppendUint32(m, flags)
	return binary.NativeEndian.AppendUint32(m, change)
}

// addAddress adds an address as the plugins' interface has it: already proved to be nobody else's, and without the route that a
// kernel would make of it, since the routes come by themselves.
func (k *netlink) addAddress(index int32, p netip.Prefix) error {
	// struct ifaddrmsg
	m := []byte{family(p.Addr()), byte(p.Bits()), 0, unix.RT_SCOPE_UNIVERSE}
	m = binary.NativeEndian.AppendUint32(m, uint32(index))
	var a attributes
	a.add(unix.IFA_ADDRESS, p.Addr().AsSlice())
	a.add(unix.IFA_LOCAL, p.Addr().AsSlice())
	a.addUint32(unix.IFA_FLAGS, unix.IFA_F_NODAD|unix.IFA_F_NOPREFIXROUTE|unix.IFA_F_PERMANENT)
	if b, ok := broadcast(p); ok {
		a.add(unix.IFA_BROADCAST, b.AsSlice())
	}
	return k.request(unix.RTM_NEWADDR, unix.NLM_F_CREATE|unix.NLM_F_EXCL, m, a)
}

// broadcast is the last address of an IPv4 network that has room for one.
func broadcast(p netip.Prefix) (netip.Addr, bool) {
	const withoutBroadcast = 31
	if !p.Addr().Is4() || p.Bits() >= withoutBroadcast {
		return netip.Addr{}, false
	}
	b := p.Addr().As4()
	last := binary.BigEndian.Uint32(b[:]) | (1<<(32-p.Bits()) - 1)
	binary.BigEndian.PutUint32(b[:], last)
	return netip.AddrFrom4(b), true
}

func (k *netlink) addRoute(index int32, r route) error {
	scope := byte(unix.RT_SCOPE_LINK)
	if r.gateway.IsValid() || r.destination.Addr().Is6() {
		scope = unix.RT_SCOPE_UNIVERSE
	}
	// struct rtmsg
	m := []byte{family(r.destination.Addr()), byte(r.destination.Bits()), 0, 0, unix.RT_TABLE_MAIN, unix.RTPROT_STATIC, scope, unix.RTN_UNICAST, 0, 0, 0, 0}
	var a attributes
	a.add(unix.RTA_DST, r.destination.Masked().Addr().AsSlice())
	a.addUint32(unix.RTA_OIF, uint32(index))
	if r.gateway.IsValid() {
		a.add(unix.RTA_GATEWAY, r.gateway.AsSlice())
	}
	if r.source.IsValid() {
		a.add(unix.RTA_PREFSRC, r.source.AsSlice())
	}
	if r.metric > 0 {
		a.addUint32(unix.RTA_PRIORITY, r.metric)
	}
	err := k.request(unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_EXCL, m, a)
	if errors.Is(err, unix.EEXIST) {
		return nil // the kernel made it of an address
	}
	return err
}

func family(a netip.Addr) byte {
	if a.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
