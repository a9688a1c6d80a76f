package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// networked are the isolations that can be joined.
var networked = isolations

// addressesOf are a running workload's, from its status: IPv4, IPv6.
func addressesOf(t *testing.T, d *daemon, id string) (v4, v6 string) {
	t.Helper()
	n := d.Inspect(t, id).Status.Networks
	if len(n) != 1 || n[0].Name != "lan" || len(n[0].Addresses) != 2 {
		t.Fatalf("networks of %s: %+v", id, n)
	}
	for _, a := range n[0].Addresses {
		p, err := netip.ParsePrefix(a)
		must(t, err)
		if p.Addr().Is4() {
			v4 = p.Addr().String()
		} else {
			v6 = p.Addr().String()
		}
	}
	return v4, v6
}

// web serves one page on both kinds of addresses.
// What it serves besides is large enough for the kernel to hand it on in pieces that exceed the MTU.
const web = `mkdir -p /srv; head -c 4194304 /dev/urandom >/srv/large; md5sum </srv/large >/srv/sum; echo served >/srv/page; exec httpd -f -p 80 -h /srv`

// page is where a server has it.
func page(address string) string {
	if strings.Contains(address, ":") {
		address = "[" + address + "]"
	}
	return "http://" + address + "/page"
}

// fetch asks until the server, which runs but may not listen yet, has answered.
func fetch(address string) []string {
	return []string{"timeout", "30", "sh", "-c", "until wget -qO- " + page(address) + " 2>/dev/null; do sleep 0.1; done"}
}

func TestNetwork(t *testing.T) {
	d := harness.NetworkedDaemon(t)
	for _, iso := range networked {
		t.Run(iso, func(t *testing.T) {
			w := d.Wall(iso)
			w.Watch(t)
			server := w.Start(t, "--network", "lan", "--hostname", "web.lan.test", busybox, "sh", "-c", web)
			v4, v6 := addressesOf(t, d, server)
			client := w.Start(t, "--network", "lan", "--hostname", "client", busybox, "sleep", "600")
			for _, a := range []string{v4, v6} {
				w.Exec(client, fetch(a)...).Run().WantOut(t, "served\n")
			}
			mine4, mine6 := addressesOf(t, d, client)
			n := w.Inspect(t, client).Status.Networks[0]
			for _, c := range []struct{ what, script, want string }{
				{"the interface is the status's", "cat /sys/class/net/eth0/address /sys/class/net/eth0/mtu", fmt.Sprintf("%s\n%d\n", n.MAC, n.MTU)},
				{"MTU of the conflist", "cat /sys/class/net/eth0/mtu", "1400\n"},
				{"IPv4 address", "ip -o -4 addr show dev eth0 scope global | awk '{print $4}'", mine4 + "/24\n"},
				{"IPv6 address", "ip -o -6 addr show dev eth0 scope global | awk '{print $4}'", mine6 + "/64\n"},
				{"IPv4 routes", "ip -4 route | awk '{print $1, $2, $3}' | sort", "10.71.0.0/24 dev eth0\ndefault via 10.71.0.1\n"},
				{"IPv6 default route", "ip -6 route | grep -c '^default via fd71::1 '", "1\n"},
				{"resolv.conf", "cat /etc/resolv.conf", "search lan.test\nnameserver 10.71.0.1\nnameserver fd71::1\noptions ndots:2\n"},
				{"hosts", "grep client /etc/hosts", mine4 + "\tclient\n" + mine6 + "\tclient\n"},
				{"the gateway answers", "ping -c 1 -W 20 10.71.0.1 >/dev/null && ping -6 -c 1 -W 20 fd71::1 >/dev/null && echo yes", "yes\n"},
				{"its own name", "ping -c 1 -W 20 client >/dev/null && hostname", "client\n"},
				{"loopback", "ping -c 1 -W 20 127.0.0.1 >/dev/null && ping -6 -c 1 -W 20 ::1 >/dev/null && echo yes", "yes\n"},
				{"it may not change its network", "ip addr add 10.71.0.99/24 dev eth0 2>/dev/null || ip link set eth0 down 2>/dev/null || echo refused", "refused\n"},
			} {
				r := w.Exec(client, "sh", "-c", c.script).Run()
				if r.Stdout != c.want {
					t.Errorf("%s: exit code %d, wrote %q, want %q; stderr: %s", c.what, r.Code, r.Stdout, c.want, r.Stderr)
				}
			}
			host := "http://" + v4
			w.Exec(client, "sh", "-c", fmt.Sprintf("[ \"$(wget -qO- %s/large | md5sum)\" = \"$(wget -qO- %s/sum)\" ] && echo same", host, host)).Run().WantOut(t, "same\n")
			if iso == "vm" { // and behind the other wall
				d.Wall("container").Run(append([]string{"--network", "lan", busybox}, fetch(v6)...)...).Run().WantOut(t, "served\n")
			}
			// Who was not joined reaches nobody.
			w.Run(busybox, "wget", "-qO-", page(v4)).Run().WantError(t, 1, "unreachable")

			// While it is stopped its address is free; it gets one again when it is started.
			w.Call(t, "stop", "--grace", "0s", server)
			if n := w.Inspect(t, server).Status.Networks; len(n) != 0 {
				t.Errorf("a stopped workload is joined to %+v", n)
			}
			for _, lease := range mustList(t, d, harness.Leases) {
				if a := filepath.Base(lease); a == v4 || a == v6 {
					t.Errorf("a stopped workload holds the lease %s", lease)
				}
			}
			w.Call(t, "start", server)
			v4, _ = addressesOf(t, d, server)
			w.Exec(client, fetch(v4)...).Run().WantOut(t, "served\n")
			w.Call(t, "rm", "-f", client, server)
		})
	}
	for _, c := range []struct {
		network string
		word    string
	}{{"wan", "lan"}, {"../lan", "lan"}} {
		d.Command("create", "--network", c.network, busybox, "true").Run().WantError(t, 125, c.word)
	}
	if out := d.Call(t, "doctor").Stdout; !strings.Contains(out, "networks: lan") {
		t.Errorf("doctor says nothing of the network:\n%s", out)
	}
}

func mustList(t *testing.T, d *daemon, list func(*daemon) ([]string, error)) []string {
	t.Helper()
	found, err := list(d)
	must(t, err)
	return found
}

// A sandbox keeps its network while its daemon is dead, and a daemon that comes back leaves the networks of those that have
// ended meanwhile.
func TestNetworkOutlivesTheDaemon(t *testing.T) {
	d := harness.NetworkedDaemon(t)
	d.Watch(t)
	for _, iso := range networked {
		w := d.Wall(iso)
		server := w.Start(t, "--network", "lan", busybox, "sh", "-c", web)
		doomed := w.Start(t, "--network", "lan", busybox, "sleep", "600")
		v4, v6 := addressesOf(t, d, server)
		pid := d.Inspect(t, doomed).Status.HostPID
		must(t, d.Kill())
		must(t, syscall.Kill(pid, syscall.SIGKILL))
		d.MustStart(t)
		// A new one reaches the one that went on.
		w.Run(append([]string{"--network", "lan", busybox}, fetch(v4)...)...).Run().WantOut(t, "served\n")
		if a, b := addressesOf(t, d, server); a != v4 || b != v6 {
			t.Errorf("the addresses were %s and %s, and are %s and %s", v4, v6, a, b)
		}
		if leases := mustList(t, d, harness.Leases); len(leases) != 2 {
			t.Errorf("leases when one of two has ended: %q", leases)
		}
		pid = d.Inspect(t, server).Status.HostPID
		must(t, d.Kill())
		must(t, syscall.Kill(pid, syscall.SIGKILL))
		d.MustStart(t)
		harness.Eventually(t, harness.SettleTimeout, "all have ended", func() (bool, string) {
			state := d.Inspect(t, server).Status.State
			return state == "WORKLOAD_STATE_FAILED", state
		})
		for _, k := range harness.NetworkKinds {
			for _, left := range mustList(t, d, k.List) {
				t.Errorf("left after all have ended: %s: %s", k.Name, left)
			}
		}
		d.Call(t, "rm", server, doomed)
	}
}

// Killed at many moments of starts and ends: nothing stays, whatever a plugin was doing.
func TestKilledWhileJoining(t *testing.T) {
	d := harness.NetworkedDaemon(t)
	d.Wall("container").Run("--network", "lan", busybox, "true").Run().Want(t, 0) // makes the bridge
	d.Watch(t)
	for _, iso := range networked {
		for _, after := range []time.Duration{60, 120, 180, 250, 350, 450, 600} {
			if iso == "vm" && after < 300 {
				continue // not yet near the network
			}
			done := make(chan harness.Result, 1)
			call := d.Wall(iso).Run("--network", "lan", busybox, "true")
			go func() { done <- call.Run() }()
			<-time.After(after * time.Millisecond)
			must(t, d.Kill())
			<-done
			d.MustStart(t)
			for _, id := range strings.Fields(d.Call(t, "ps", "-a", "-q").Stdout) {
				d.Call(t, "rm", "-f", id)
			}
		}
	}
}

// A workload that may administer its network can delete its interface, or give it other addresses. What the host did for the
// address it was given is taken back all the same; the leak check looks for masquerading rules and leases.
func TestNetworkIsLeftWhateverBecameOfTheInterface(t *testing.T) {
	d := harness.NetworkedDaemon(t)
	d.Wall("container").Run("--network", "lan", busybox, "true").Run().Want(t, 0) // makes the bridge
	for _, script := range []string{
		"ip link del eth0",
		"ip addr flush dev eth0",
		"ip addr flush dev eth0; ip addr add 10.71.0.77/24 dev eth0; ip addr add 10.9.9.9/32 dev eth0",
		"ip link set eth0 down; ip link set eth0 name eth7; ip link add eth0 type dummy || ip link add eth0 type bridge",
	} {
		t.Run(script, func(t *testing.T) {
			d.Watch(t)
			d.Wall("container").Run("--network", "lan", "--cap-add", "NET_ADMIN", busybox, "sh", "-ec", script).Run().Want(t, 0)
		})
	}
}

// A leak check that finds nothing proves nothing unless it finds what is there.
func TestNetworkLeakCheckFinds(t *testing.T) {
	d := harness.NetworkedDaemon(t)
	for _, c := range []struct {
		kind            string
		plant, takeBack func() error
	}{
		{"device in the daemon's namespace",
			func() error {
				return runChild(d.Within("ip", "link", "add", "planted0", "type", "veth", "peer", "name", "planted1"))
			},
			func() error { return runChild(d.Within("ip", "link", "del", "planted0")) }},
		{"lease",
			func() error {
				file := d.LeaseFile("10.71.0.200")
				return errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, nil, 0o600))
			},
			func() error { return os.Remove(d.LeaseFile("10.71.0.200")) }},
		{"masquerading rule",
			func() error { return runChild(d.Within("iptables", "-w", "10", "-t", "nat", "-N", "CNI-planted")) },
			func() error { return runChild(d.Within("iptables", "-w", "10", "-t", "nat", "-X", "CNI-planted")) }},
	} {
		before := harness.TakeSnapshot(t, d)
		must(t, c.plant())
		found, err := before.Leaks(d, 0)
		must(t, err)
		must(t, c.takeBack())
		if !slices.ContainsFunc(found, func(f string) bool { return strings.HasPrefix(f, c.kind) }) {
			t.Errorf("planted a %s, found %q", c.kind, found)
		}
	}
}

func runChild(cmd *exec.Cmd) error {
	if err := harness.StartChild(cmd); err != nil {
		return err
	}
	return harness.WaitChild(cmd)
}
