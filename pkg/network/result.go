package network

import (
	"cmp"
	"fmt"
	"net"
	"net/netip"
	"os"
	"regexp"
	"slices"

	"github.com/containernetworking/cni/pkg/types"
	types100 "github.com/containernetworking/cni/pkg/types/100"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/osthread"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Bounds of what a network may give a sandbox: far beyond what anyone uses, and small enough for a record and a message.
const (
	maxAddresses   = 32
	maxRoutes      = 256
	maxNameservers = 8
	maxDNSWords    = 16
)

// look reads what the plugins made of the sandbox's interface. The kernel is asked, not the plugins' result: that leaves out
// routes that are on the link, the MTU, and what a later plugin of the chain changed; and a VM's guest must get exactly what a
// container has.
func look(netns *os.File) (spec.Network, error) {
	var found spec.Network
	err := within(netns, func(h *netlink.Handle) (err error) {
		found, err = lookWith(h)
		return err
	})
	return found, err
}

// within calls fn with a handle that talks of a network namespace.
func within(netns *os.File, fn func(*netlink.Handle) error) error {
	return osthread.Run(func() error {
		if err := unix.Setns(int(netns.Fd()), unix.CLONE_NEWNET); err != nil {
			return fmt.Errorf("cannot enter the network namespace: %w", err)
		}
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return fmt.Errorf("cannot ask the kernel: %w", err)
		}
		defer h.Close()
		return fn(h)
	})
}

func lookWith(h *netlink.Handle) (spec.Network, error) {
	link, err := h.LinkByName(ifName)
	if err != nil {
		return spec.Network{}, fmt.Errorf("its plugins made no interface %s: %w", ifName, err)
	}
	a := link.Attrs()
	n := spec.Network{Interface: ifName, MAC: a.HardwareAddr.String(), MTU: uint32(a.MTU)}
	addrs, err := h.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return spec.Network{}, fmt.Errorf("cannot list addresses: %w", err)
	}
	for _, addr := range addrs {
		p, ok := prefixOf(addr.IPNet)
		if ok && addr.Scope < int(netlink.SCOPE_LINK) {
			n.Addresses = append(n.Addresses, p)
		}
	}
	routes, err := h.RouteListFiltered(netlink.FAMILY_ALL, &netlink.Route{LinkIndex: a.Index, Table: unix.RT_TABLE_MAIN},
		netlink.RT_FILTER_OIF|netlink.RT_FILTER_TABLE)
	if err != nil {
		return spec.Network{}, fmt.Errorf("cannot list routes: %w", err)
	}
	for _, r := range routes {
		if route, ok := routeOf(r); ok {
			n.Routes = append(n.Routes, route)
		}
	}
	if len(n.Addresses) > maxAddresses || len(n.Routes) > maxRoutes {
		return spec.Network{}, fmt.Errorf("%d addresses and %d routes are more than a sandbox can have (%d and %d)", len(n.Addresses), len(n.Routes), maxAddresses, maxRoutes)
	}
	// Those on the link first: gateways are reached by them.
	slices.SortStableFunc(n.Routes, func(a, b spec.Route) int {
		return cmp.Compare(boolInt(a.Gateway.IsValid()), boolInt(b.Gateway.IsValid()))
	})
	return n, nil
}

func boolInt(b bool) int {
	if b {
		return 1
	}
	return 0
}

// routeOf leaves out what a kernel makes by itself whatever the addresses: link-local and multicast.
func routeOf(r netlink.Route) (spec.Route, bool) {
	if r.Type != unix.RTN_UNICAST {
		return spec.Route{}, false
	}
	var route spec.Route
	switch {
	case r.Dst != nil:
		var ok bool
		if route.Destination, ok = prefixOf(r.Dst); !ok {
			return spec.Route{}, false
		}
	case r.Family == netlink.FAMILY_V6:
		route.Destination = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
	default:
		route.Destination = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	}
	dst := route.Destination.Addr()
	if dst.Is6() && (dst.IsLinkLocalUnicast() || dst.IsMulticast()) {
		return spec.Route{}, false
	}
	if gw, ok := netip.AddrFromSlice(r.Gw); ok {
		route.Gateway = gw.Unmap()
	}
	if src, ok := netip.AddrFromSlice(r.Src); ok {
		route.Source = src.Unmap()
	}
	route.Metric = uint32(r.Priority)
	return route, true
}

func prefixOf(n *net.IPNet) (netip.Prefix, bool) {
	if n == nil {
		return netip.Prefix{}, false
	}
	addr, ok := netip.AddrFromSlice(n.IP)
	ones, bits := n.Mask.Size()
	if bits == 32 {
		addr = addr.Unmap()
	}
	return netip.PrefixFrom(addr, ones), ok
}

var (
	searchPattern = regexp.MustCompile(`^[a-zA-Z0-9_]([a-zA-Z0-9_.-]{0,252})$`)
	optionPattern = regexp.MustCompile(`^[a-z0-9-]{1,32}(:[0-9]{1,5})?$`)
)

// dnsOf takes the name servers out of a plugin's result. They go into a file of the sandbox: no word may be two lines.
func dnsOf(result types.Result) (spec.DNS, error) {
	r, err := types100.NewResultFromResult(result)
	if err != nil {
		return spec.DNS{}, fmt.Errorf("cannot use the plugins' result: %w", err)
	}
	var dns spec.DNS
	for _, s := range r.DNS.Nameservers {
		addr, err := netip.ParseAddr(s)
		if err != nil || addr.Zone() != "" {
			return spec.DNS{}, fmt.Errorf("name server %q is no address", clip(s))
		}
		dns.Nameservers = append(dns.Nameservers, addr)
	}
	dns.Search, dns.Options = r.DNS.Search, r.DNS.Options
	if len(dns.Search) == 0 && r.DNS.Domain != "" {
		dns.Search = []string{r.DNS.Domain}
	}
	if len(dns.Nameservers) > maxNameservers || len(dns.Search) > maxDNSWords || len(dns.Options) > maxDNSWords {
		return spec.DNS{}, fmt.Errorf("%d name servers, %d search domains and %d options are more than a sandbox can have", len(dns.Nameservers), len(dns.Search), len(dns.Options))
	}
	for _, s := range dns.Search {
		if s != "." && !searchPattern.MatchString(s) {
			return spec.DNS{}, fmt.Errorf("search domain %q is no name of a domain", clip(s))
		}
	}
	for _, o := range dns.Options {
		if !optionPattern.MatchString(o) {
			return spec.DNS{}, fmt.Errorf("%q is no option of resolv.conf", clip(o))
		}
	}
	return dns, nil
}
