package spec

import "net/netip"

// NoNetwork is the network of a sandbox that reaches nothing: it has a loopback interface only. The empty name means it too.
const NoNetwork = "none"

// Joins reports whether a workload that asks for network is to be joined to one.
func Joins(network string) bool { return network != "" && network != NoNetwork }

// Network is what a sandbox has of a network it was joined to: what its interface was seen to have in the host's kernel
// once the network's plugins were done, before anything ran in the sandbox.
type Network struct {
	Name string `json:"name"`
	// In the sandbox: eth0.
	Interface string `json:"interface"`
	MAC       string `json:"mac,omitempty"`
	MTU       uint32 `json:"mtu,omitempty"`
	// Those of global scope, with the length of their prefix.
	Addresses []netip.Prefix `json:"addresses,omitempty"`
	// In the order in which a kernel takes them: a gateway is reached by a route before it.
	Routes []Route `json:"routes,omitempty"`
	DNS    DNS     `json:"dns,omitzero"`
}

// Route is a route through the network's interface.
type Route struct {
	Destination netip.Prefix `json:"destination"`
	// Invalid where the destination is on the link itself.
	Gateway netip.Addr `json:"gateway,omitzero"`
	// The address that packets leave with, where the route says.
	Source netip.Addr `json:"source,omitzero"`
	Metric uint32     `json:"metric,omitempty"`
}

// DNS is what goes into a sandbox's resolv.conf.
type DNS struct {
	Nameservers []netip.Addr `json:"nameservers,omitempty"`
	Search      []string     `json:"search,omitempty"`
	Options     []string     `json:"options,omitempty"`
}
