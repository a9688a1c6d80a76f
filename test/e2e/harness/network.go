package harness

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/osthread"
)

// Networks are tried with the plugins of Debian's containernetworking-plugins, by daemons that live in a network namespace of
// their own: bridges, masquerading and leases are theirs, and the machine's network is not touched.

// cniPlugins is where the package has its programs.
const cniPlugins = "/usr/lib/cni"

// lan is a network as an operator writes one: a bridge with both kinds of addresses, masquerading and name servers.
const lan = `{"cniVersion": "1.0.0", "name": "lan", "plugins": [{
	"type": "bridge", "bridge": "sbx0", "isGateway": true, "ipMasq": true, "mtu": 1400,
	"ipam": {
		"type": "host-local", "dataDir": %q,
		"ranges": [[{"subnet": "10.71.0.0/24"}], [{"subnet": "fd71::/64"}]],
		"routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
	},
	"dns": {"nameservers": ["10.71.0.1", "fd71::1"], "search": ["lan.test"], "options": ["ndots:2"]}
}]}`

// NetworkKinds are what a joined workload has outside of its sandbox.
var NetworkKinds = []Kind{
	{"device in the daemon's namespace", listDaemonDevices},
	{"lease", Leases},
	{"masquerading rule", listNATRules},
}

// networkOf is what a daemon has when it lives in a namespace of its own.
type networkOf struct {
	file *os.File
	// Of the networks' address management.
	leases string
}

// NetworkedDaemon starts a daemon in a network namespace of its own that has the network lan.
func NetworkedDaemon(t *testing.T, args ...string) *Daemon {
	t.Helper()
	d := MakeNetworkedDaemon(t, args...)
	d.MustStart(t)
	Must(t, d.Import(Busybox))
	return d
}

// MakeNetworkedDaemon makes one, to be started.
func MakeNetworkedDaemon(t *testing.T, args ...string) *Daemon {
	t.Helper()
	dir := t.TempDir()
	n := &networkOf{leases: filepath.Join(dir, "leases")}
	Must(t, osthread.Run(func() (err error) {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
		n.file, err = os.Open("/proc/thread-self/ns/net")
		return err
	}))
	t.Cleanup(func() { Must(t, n.file.Close()) })
	conf := filepath.Join(dir, "net.d")
	Must(t, os.Mkdir(conf, 0o755))
	Must(t, os.WriteFile(filepath.Join(conf, "lan.conflist"), fmt.Appendf(nil, lan, n.leases), 0o644))
	d := MakeDaemon(t, append([]string{"--cni-conf-dir", conf, "--cni-plugin-dir", cniPlugins}, args...)...)
	d.network = n
	return d
}

// enter runs fn in the daemon's network namespace; without one of its own, in the machine's.
func (d *Daemon) enter(fn func() error) error {
	if d == nil || d.network == nil {
		return fn()
	}
	return osthread.Run(func() error {
		if err := unix.Setns(int(d.network.file.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return fn()
	})
}

// Within makes command run in the daemon's network namespace.
func (d *Daemon) Within(command ...string) *exec.Cmd {
	if d.network != nil {
		command = append([]string{"nsenter", fmt.Sprintf("--net=/proc/%d/fd/%d", os.Getpid(), d.network.file.Fd()), "--"}, command...)
	}
	return exec.Command(command[0], command[1:]...)
}

// listDaemonDevices finds network devices in a daemon's own namespace. Bridges stay: their plugin makes one for all.
func listDaemonDevices(d *Daemon) ([]string, error) {
	if d == nil || d.network == nil {
		return nil, nil
	}
	var found []string
	err := d.enter(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			if l.Type() != "bridge" && l.Attrs().Name != "lo" {
				found = append(found, fmt.Sprintf("%s %s", l.Type(), l.Attrs().Name))
			}
		}
		return err
	})
	return found, err
}

// Leases finds addresses that are given out.
func Leases(d *Daemon) ([]string, error) {
	if d == nil || d.network == nil {
		return nil, nil
	}
	var found []string
	err := filepath.WalkDir(d.network.leases, func(path string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return nil
		case err != nil:
			return err
		}
		if _, err := netip.ParseAddr(e.Name()); err == nil {
			found = append(found, path)
		}
		return nil
	})
	return found, err
}

// LeaseFile is where an address of the network lan is given out.
func (d *Daemon) LeaseFile(address string) string {
	return filepath.Join(d.network.leases, "lan", address)
}

// listNATRules finds what masquerades a sandbox's address.
func listNATRules(d *Daemon) ([]string, error) {
	if d == nil || d.network == nil {
		return nil, nil
	}
	var found []string
	for _, program := range []string{"iptables", "ip6tables"} {
		var complaint bytes.Buffer
		cmd := d.Within(program, "-w", "10", "-t", "nat", "-S")
		cmd.Stderr = &complaint
		if err := startOutput(cmd, func(line string) {
			if strings.Contains(line, "CNI") {
				found = append(found, program+" "+line)
			}
		}); err != nil {
			return nil, fmt.Errorf("%s: %w: %s", program, err, complaint.String())
		}
	}
	return found, nil
}

// startOutput runs cmd as a child that the leak check knows, and hands over its lines.
func startOutput(cmd *exec.Cmd, line func(string)) error {
	var out bytes.Buffer
	cmd.Stdout = &out
	if err := StartChild(cmd); err != nil {
		return err
	}
	if err := WaitChild(cmd); err != nil {
		return err
	}
	for l := range strings.Lines(out.String()) {
		line(strings.TrimSuffix(l, "\n"))
	}
	return nil
}
