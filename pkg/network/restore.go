package network

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// standInPeer is the other end of an interface that stands in for a lost one. Nobody uses it.
const standInPeer = "sandboxd-gone"

// restore makes the interface in the namespace pinned at path be there with the addresses that ADD gave it. DEL goes by what it
// finds there: the bridge plugin masquerades no more for the addresses of the interface, and without one takes nothing back. A
// workload that may administer its network could so leave rules on the host for ever, and for addresses it made up have
// plugins look for rules. The sandbox has ended: nobody changes anything meanwhile.
func restore(ctx context.Context, path string, joined spec.Network) error {
	netns, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("cannot open the network namespace: %w", err)
	}
	defer netns.Close()
	return within(netns, func(h *netlink.Handle) error {
		if err := restoreWith(ctx, h, joined.Addresses); err != nil {
			return fmt.Errorf("cannot bring interface %s back to what it was: %w", ifName, err)
		}
		return nil
	})
}

func restoreWith(ctx context.Context, h *netlink.Handle, addresses []netip.Prefix) error {
	link, err := h.LinkByName(ifName)
	var missing netlink.LinkNotFoundError
	if errors.As(err, &missing) {
		link, err = standIn(h)
	}
	if err != nil {
		return err
	}
	there, err := h.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	var kept []netip.Prefix
	for _, a := range there {
		if err := ctx.Err(); err != nil {
			return err // a workload can have made very many
		}
		p, ok := prefixOf(a.IPNet)
		switch {
		case ok && slices.Contains(addresses, p):
			kept = append(kept, p)
		case a.IP.IsLinkLocalUnicast(): // the kernel's own; no plugin goes by it
		default:
			// One may take others with it: of a subnet the secondary ones.
			if err := h.AddrDel(link, &a); err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
				return err
			}
		}
	}
	for _, p := range addresses {
		a := &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}, Flags: unix.IFA_F_NODAD}
		if err := h.AddrReplace(link, a); err != nil && !slices.Contains(kept, p) {
			return err
		}
	}
	return nil
}

// standIn makes an interface of a kind that every host with a bridge has.
func standIn(h *netlink.Handle) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = ifName
	if err := h.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: standInPeer}); err != nil {
		return nil, err
	}
	return h.LinkByName(ifName)
}
