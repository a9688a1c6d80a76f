package guest

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

// network is what the daemon says the sandbox was joined to.
type network struct {
	name, ifName              string
	mac                       []byte
	mtu                       uint32
	addresses                 []netip.Prefix
	routes                    []route
	nameservers               []netip.Addr
	searchDomains, dnsOptions []string
}

type route struct {
	destination     netip.Prefix
	gateway, source netip.Addr // may be invalid
	metric          uint32
}

const (
	macLen = 6
	// maxMTU is that of a loopback, the largest there is.
	maxMTU = 65536
)

// maxInterfaceName is the kernel's (IFNAMSIZ, without the NUL at its end).
const maxInterfaceName = unix.IFNAMSIZ - 1

// isInterfaceName: letters, digits, and after the first also _ and -. The kernel takes these and more.
func isInterfaceName(s string) bool {
	if s == "" || len(s) > maxInterfaceName {
		return false
	}
	for i := range len(s) {
		switch c := s[i]; {
		case 'a' <= c && c <= 'z', 'A' <= c && c <= 'Z', '0' <= c && c <= '9':
		case i > 0 && (c == '_' || c == '-'):
		default:
			return false
		}
	}
	return true
}

// parseNetwork answers nil for a sandbox without a network. Words that go into files must not hold a second line.
func parseNetwork(m *agentv1.Network) (*network, error) {
	if m == nil {
		return nil, nil
	}
	n := &network{name: m.Name, ifName: m.Interface, mac: m.Mac, mtu: m.Mtu, searchDomains: m.Search, dnsOptions: m.Options}
	switch {
	case !isInterfaceName(m.Interface):
		return nil, fmt.Errorf("%q is no name of an interface", m.Interface)
	case len(m.Mac) != 0 && len(m.Mac) != macLen:
		return nil, fmt.Errorf("a hardware address has %d bytes", len(m.Mac))
	case m.Mtu > maxMTU:
		return nil, fmt.Errorf("an MTU of %d is too large", m.Mtu)
	}
	for _, word := range append(append([]string{m.Name}, m.Search...), m.Options...) {
		if word == "" || strings.ContainsAny(word, " \t\r\n\x00") {
			return nil, fmt.Errorf("%q is no single word", word)
		}
	}
	var err error
	for _, a := range m.Addresses {
		p, perr := netip.ParsePrefix(a)
		err = errors.Join(err, perr)
		n.addresses = append(n.addresses, p)
	}
	for _, r := range m.Routes {
		parsed, perr := parseRoute(r)
		err = errors.Join(err, perr)
		n.routes = append(n.routes, parsed)
	}
	for _, s := range m.Nameservers {
		a, perr := netip.ParseAddr(s)
		err = errors.Join(err, perr)
		n.nameservers = append(n.nameservers, a)
	}
	return n, err
}

func parseRoute(m *agentv1.Route) (r route, err error) {
	r.metric = m.Metric
	if r.destination, err = netip.ParsePrefix(m.Destination); err != nil {
		return r, err
	}
	for _, a := range []struct {
		to   *netip.Addr
		from string
	}{{&r.gateway, m.Gateway}, {&r.source, m.Source}} {
		if a.from == "" {
			continue
		}
		if *a.to, err = netip.ParseAddr(a.from); err != nil {
			return r, err
		}
		if a.to.Is4() != r.destination.Addr().Is4() {
			return r, fmt.Errorf("a route to %v cannot go by %v", r.destination, *a.to)
		}
	}
	return r, nil
}

// hosts is the content of /etc/hosts. Of no network, nil, too.
func (n *network) hosts(hostname string) string {
	var b strings.Builder
	b.WriteString("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n")
	if n == nil || len(n.addresses) == 0 {
		fmt.Fprintf(&b, "127.0.1.1\t%s\n", hostname)
		return b.String()
	}
	for _, a := range n.addresses {
		fmt.Fprintf(&b, "%v\t%s\n", a.Addr(), hostname)
	}
	return b.String()
}

// resolvConf is the content of /etc/resolv.conf. Of no network, nil, too.
func (n *network) resolvConf() string {
	switch {
	case n == nil:
		return "# This sandbox has no name server.\n"
	case len(n.nameservers) == 0:
		return "# Network " + n.name + " names no name server.\n"
	}
	var b strings.Builder
	if len(n.searchDomains) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(n.searchDomains, " "))
	}
	for _, s := range n.nameservers {
		fmt.Fprintf(&b, "nameserver %v\n", s)
	}
	if len(n.dnsOptions) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(n.dnsOptions, " "))
	}
	return b.String()
}
