package microvm

import (
	"errors"
	"fmt"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/osthread"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// A VM's network card is a tap in a network namespace made for it. Plugins put their interface there too, and the two are
// joined: whatever comes in by one goes out by the other, untouched, before the namespace's own stack sees it.
//
//	guest's eth0 ══ QEMU ══ tap0 ⇄ eth0 ── the network
//	                        └─ one namespace ─┘  (no process is in it; QEMU's own is empty)
//
// The guest's interface has the address, hardware address and MTU of the plugins' one, so that for the network it is that.

const (
	tapName = "tap0"
	// cardMAC is the card's until the agent gives it the interface's.
	cardMAC = "02:00:00:00:00:01"
)

// networkCard are the two descriptors of a tap: QEMU's way to it, and where it is.
type networkCard struct{ tap, netns *os.File }

// newNetworkCard makes a namespace with a tap in it. Both last as long as anybody has a descriptor.
func newNetworkCard() (c networkCard, err error) {
	err = osthread.Run(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		defer func() {
			if err != nil {
				err = errors.Join(err, c.close())
			}
		}()
		if c.netns, err = os.Open("/proc/thread-self/ns/net"); err != nil {
			return err
		}
		// Not by os.Open: QEMU gets it, and Go's poller must not have it.
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("cannot open /dev/net/tun: %w; load the kernel module tun", err)
		}
		c.tap = os.NewFile(uintptr(fd), tapName)
		request, err := unix.NewIfreq(tapName)
		if err != nil {
			return err
		}
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
		return unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
	})
	if err != nil {
		return networkCard{}, fmt.Errorf("cannot make a network card: %w", err)
	}
	return c, nil
}

func (c networkCard) close() error {
	var err error
	for _, f := range []*os.File{c.tap, c.netns} {
		if f != nil {
			err = errors.Join(err, f.Close())
		}
	}
	return err
}

var _ runtime.Networker = (*instance)(nil)

// NetNS implements runtime.Networker.
func (i *instance) NetNS() (*os.File, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.netns == nil {
		return nil, spec.Errorf(spec.KindWrongState, "microVM %s has no network card to be joined", i.rec.ID)
	}
	fd, err := unix.FcntlInt(i.netns.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the network namespace of microVM %s: %w", i.rec.ID, err)
	}
	return os.NewFile(uintptr(fd), "netns"), nil
}

// Connect implements runtime.Networker: it joins the tap to the interface that is now beside it.
func (i *instance) Connect(n spec.Network) error {
	netns, err := i.NetNS()
	if err != nil {
		return err
	}
	defer netns.Close()
	err = osthread.Run(func() error {
		if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return joinLinks(n)
	})
	if err != nil {
		return fmt.Errorf("cannot connect the network card of microVM %s: %w", i.rec.ID, err)
	}
	i.dropNetNS()
	return nil
}

// dropNetNS: from here on QEMU's tap keeps the namespace.
func (i *instance) dropNetNS() {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.netns != nil {
		_ = i.netns.Close() // only looked at
		i.netns = nil
	}
}

// joinLinks runs in the namespace.
func joinLinks(n spec.Network) error {
	outside, err := netlink.LinkByName(n.Interface)
	if err != nil {
		return fmt.Errorf("%s: %w", n.Interface, err)
	}
	tap, err := netlink.LinkByName(tapName)
	if err != nil {
		return fmt.Errorf("%s: %w", tapName, err)
	}
	// The tap says nothing of its own to the guest.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/"+tapName+"/disable_ipv6", []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := netlink.LinkSetMTU(tap, int(n.MTU)); err != nil {
		return fmt.Errorf("cannot set the MTU: %w", err)
	}
	for _, way := range []struct{ from, to netlink.Link }{{outside, tap}, {tap, outside}} {
		if err := redirect(way.from, way.to); err != nil {
			return fmt.Errorf("cannot redirect %s to %s: %w", way.from.Attrs().Name, way.to.Attrs().Name, err)
		}
		if err := netlink.LinkSetUp(way.from); err != nil {
			return fmt.Errorf("cannot bring %s up: %w", way.from.Attrs().Name, err)
		}
	}
	return nil
}

// redirect sends everything that comes in by from out by to. The filter is u32 without a condition: kernels that lack matchall
// have it.
func redirect(from, to netlink.Link) error {
	ingress := netlink.MakeHandle(0xffff, 0)
	if err := netlink.QdiscAdd(&netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: from.Attrs().Index, Handle: ingress, Parent: netlink.HANDLE_INGRESS,
	}}); err != nil {
		return fmt.Errorf("ingress: %w; load the kernel module sch_ingress", err)
	}
	if err := netlink.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: from.Attrs().Index, Parent: ingress, Priority: 1, Protocol: unix.ETH_P_ALL},
		Actions: []netlink.Action{&netlink.MirredAction{
			ActionAttrs:  netlink.ActionAttrs{Action: netlink.TC_ACT_STOLEN},
			MirredAction: netlink.TCA_EGRESS_REDIR,
			Ifindex:      to.Attrs().Index,
		}},
	}); err != nil {
		return fmt.Errorf("filter: %w; load the kernel modules cls_u32 and act_mirred", err)
	}
	return nil
}
