package guest

import (
	"testing"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

func TestNetworkFiles(t *testing.T) {
	n, err := parseNetwork(&agentv1.Network{
		Name: "lan", Interface: "eth0", Mac: []byte{2, 0, 0, 0, 0, 1}, Mtu: 1400, Addresses: []string{"10.0.0.2/24", "fd00::2/64"},
		Routes:      []*agentv1.Route{{Destination: "0.0.0.0/0", Gateway: "10.0.0.1", Source: "10.0.0.2"}},
		Nameservers: []string{"10.0.0.1"}, Search: []string{"lan.test"}, Options: []string{"ndots:2"},
	})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := n.hosts("box"), "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n10.0.0.2\tbox\nfd00::2\tbox\n"; got != want {
		t.Errorf("hosts: %q, want %q", got, want)
	}
	if got, want := n.resolvConf(), "search lan.test\nnameserver 10.0.0.1\noptions ndots:2\n"; got != want {
		t.Errorf("resolv.conf: %q, want %q", got, want)
	}
	var none *network
	if got, want := none.hosts("box"), "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\tbox\n"; got != want {
		t.Errorf("hosts without a network: %q, want %q", got, want)
	}
}

func TestBadNetworks(t *testing.T) {
	for name, m := range map[string]*agentv1.Network{
		"interface":        {Name: "n", Interface: "../eth0"},
		"MAC":              {Name: "n", Interface: "eth0", Mac: []byte{1}},
		"MTU":              {Name: "n", Interface: "eth0", Mtu: 1 << 20},
		"address":          {Name: "n", Interface: "eth0", Addresses: []string{"10.0.0.1"}},
		"route":            {Name: "n", Interface: "eth0", Routes: []*agentv1.Route{{Destination: "x"}}},
		"mixed families":   {Name: "n", Interface: "eth0", Routes: []*agentv1.Route{{Destination: "::/0", Gateway: "10.0.0.1"}}},
		"name server":      {Name: "n", Interface: "eth0", Nameservers: []string{"localhost"}},
		"line in a domain": {Name: "n", Interface: "eth0", Search: []string{"a\nnameserver 6.6.6.6"}},
		"line in a name":   {Name: "n\nnameserver 6.6.6.6", Interface: "eth0"},
	} {
		if _, err := parseNetwork(m); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

func TestInterfaceNames(t *testing.T) {
	for name, want := range map[string]bool{
		"eth0": true, "0": true, "A-b_9": true, "abcdefghijklmno": true,
		"": false, "abcdefghijklmnop": false, "-a": false, "_a": false, "a/b": false, "a.b": false, "a b": false, "é": false, "a\n": false, "..": false,
	} {
		if got := isInterfaceName(name); got != want {
			t.Errorf("%q: %v", name, got)
		}
	}
}
