package agent

import (
	"fmt"
	"net"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

func networkMessage(n *spec.Network) (*agentv1.Network, error) {
	if n == nil {
		return nil, nil
	}
	m := &agentv1.Network{Name: n.Name, Interface: n.Interface, Mtu: n.MTU, Search: n.DNS.Search, Options: n.DNS.Options}
	if n.MAC != "" {
		mac, err := net.ParseMAC(n.MAC)
		if err != nil {
			return nil, fmt.Errorf("cannot describe network %q to the sandbox: %w", n.Name, err)
		}
		m.Mac = mac
	}
	for _, a := range n.Addresses {
		m.Addresses = append(m.Addresses, a.String())
	}
	for _, r := range n.Routes {
		route := &agentv1.Route{Destination: r.Destination.String(), Metric: r.Metric}
		if r.Gateway.IsValid() {
			route.Gateway = r.Gateway.String()
		}
		if r.Source.IsValid() {
			route.Source = r.Source.String()
		}
		m.Routes = append(m.Routes, route)
	}
	for _, s := range n.DNS.Nameservers {
		m.Nameservers = append(m.Nameservers, s.String())
	}
	return m, nil
}
