package network

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/osthread"
)

// The plugin of these tests is this program itself: libcni runs it under the name of a link.
func TestMain(m *testing.M) {
	switch {
	case os.Getenv("CNI_COMMAND") != "":
		os.Exit(pluginMain())
	case os.Getenv(crashEnv) != "":
		crashMain(os.Getenv(crashEnv))
	}
	os.Exit(m.Run())
}

// fakeConf is what a test's conflist tells its plugin.
type fakeConf struct {
	Type string `json:"type"`
	// Where it writes down that it was called.
	Calls string `json:"calls,omitempty"`
	// Of the network manager, to see what is there at ADD.
	State string `json:"state,omitempty"`
	// What it does at ADD instead of its work.
	Add string `json:"add,omitempty"`
	// What it does at DEL instead.
	Del string `json:"del,omitempty"`
	DNS string `json:"fakeDNS,omitempty"`
}

const mtuOfFake = 1400

func pluginMain() int {
	stdin, _ := io.ReadAll(os.Stdin)
	var c fakeConf
	if err := json.Unmarshal(stdin, &c); err != nil {
		fmt.Println("cannot read the configuration:", err)
		return 1
	}
	say := func(what string) {
		f, err := os.OpenFile(c.Calls, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
		if err == nil {
			_, err = fmt.Fprintln(f, what)
		}
		if err != nil {
			panic(err)
		}
		_ = f.Close()
	}
	command, netns := os.Getenv("CNI_COMMAND"), os.Getenv("CNI_NETNS")
	say(fmt.Sprintf("%s netns=%t", command, netns != ""))
	if command == "ADD" {
		return pluginAdd(c, netns, say)
	}
	switch c.Del {
	case "fail":
		fmt.Println(`{"cniVersion":"1.0.0","code":11,"msg":"not now"}`)
		return 1
	}
	if netns != "" {
		err := inNamespace(netns, func() error {
			link, err := netlink.LinkByName(ifName)
			if err != nil {
				return nil
			}
			return netlink.LinkDel(link)
		})
		if err != nil {
			say(err.Error())
		}
	}
	say("DEL done")
	return 0
}

func pluginAdd(c fakeConf, netns string, say func(string)) int {
	id := os.Getenv("CNI_CONTAINERID")
	if _, err := readRecord(filepath.Join(c.State, id)); err != nil {
		say("no record at ADD: " + err.Error())
	}
	for _, v := range os.Environ() {
		if name, _, _ := strings.Cut(v, "="); !strings.HasPrefix(name, "CNI_") && name != "PATH" && name != "LC_ALL" {
			say("environment: " + v)
		}
	}
	switch c.Add {
	case "fail":
		fmt.Println(`{"cniVersion":"1.0.0","code":100,"msg":"no address","details":"of 254"}`)
		return 1
	case "die":
		fmt.Fprintln(os.Stderr, "a bug")
		return 2
	case "hang":
		time.Sleep(time.Hour)
	case "slow":
		time.Sleep(2 * time.Second)
	case "garbage":
		fmt.Println("}{")
		return 0
	case "flood":
		_, err := os.Stdout.WriteString(strings.Repeat("x", 4*maxAnswer))
		if err != nil {
			return 3
		}
		return 0
	}
	if c.Add != "nothing" {
		err := inNamespace(netns, func() error {
			attrs := netlink.NewLinkAttrs()
			attrs.Name, attrs.MTU = ifName, mtuOfFake
			if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: "peer"}); err != nil {
				return err
			}
			link, err := netlink.LinkByName(ifName)
			if err != nil {
				return err
			}
			addr, err := netlink.ParseAddr("10.9.8.7/24")
			if err != nil {
				return err
			}
			peer, err := netlink.LinkByName("peer")
			if err != nil {
				return err
			}
			return errors.Join(netlink.AddrAdd(link, addr), netlink.LinkSetUp(link), netlink.LinkSetUp(peer),
				netlink.RouteAdd(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: []byte{10, 9, 8, 1}}))
		})
		if err != nil {
			say("cannot make the interface: " + err.Error())
			return 4
		}
	}
	say("ADD done")
	dns := c.DNS
	if dns == "" {
		dns = `{"nameservers":["10.9.8.1"],"search":["fake.test"],"options":["ndots:1"]}`
	}
	fmt.Printf(`{"cniVersion":"1.0.0","interfaces":[{"name":"eth0"}],"ips":[{"address":"10.9.8.7/24"}],"dns":%s}`, dns)
	return 0
}

func inNamespace(path string, fn func() error) error {
	return osthread.Run(func() error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
			return err
		}
		return fn()
	})
}

// rig is a manager with a network "fake" and a namespace to join.
type rig struct {
	t *testing.T
	*Manager
	cfg   Config
	calls string
	netns *os.File
}

const (
	testID      = "0123456789abcdef0123456789abcdef"
	testTimeout = 3 * time.Second
)

func newRig(t *testing.T, c fakeConf) *rig {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("this test makes network namespaces: run it as root")
	}
	dir := t.TempDir()
	r := &rig{t: t, calls: filepath.Join(dir, "calls"), cfg: Config{
		ConfDir: filepath.Join(dir, "conf"), PluginDirs: []string{filepath.Join(dir, "plugins")},
		StateDir: filepath.Join(dir, "state"), RunDir: filepath.Join(dir, "run"),
		Timeout: testTimeout, OrphanGrace: testTimeout,
	}}
	for _, d := range []string{r.cfg.ConfDir, r.cfg.PluginDirs[0]} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(self, filepath.Join(r.cfg.PluginDirs[0], "fake")); err != nil {
		t.Fatal(err)
	}
	r.write("fake.conflist", r.conflist("fake", c), 0o644)
	r.reopen()
	t.Cleanup(func() { _ = unpin(r.pin(testID)) }) // of a test that failed
	if err := osthread.Run(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		r.netns, err = os.Open("/proc/thread-self/ns/net")
		return err
	}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.netns.Close() })
	return r
}

func (r *rig) conflist(name string, c fakeConf) string {
	c.Type, c.Calls, c.State = "fake", r.calls, filepath.Join(r.cfg.StateDir, "network")
	b, err := json.Marshal(c)
	if err != nil {
		r.t.Fatal(err)
	}
	return fmt.Sprintf(`{"cniVersion":"1.0.0","name":%q,"plugins":[%s]}`, name, b)
}

func (r *rig) write(name, content string, mode os.FileMode) {
	r.t.Helper()
	path := filepath.Join(r.cfg.ConfDir, name)
	if err := os.WriteFile(path, []byte(content), mode); err != nil {
		r.t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		r.t.Fatal(err)
	}
}

// reopen is what a daemon does that comes back.
func (r *rig) reopen() {
	r.t.Helper()
	m, err := New(r.cfg)
	if err != nil {
		r.t.Fatal(err)
	}
	r.Manager = m
}

func (r *rig) called() []string {
	b, err := os.ReadFile(r.calls)
	if err != nil && !os.IsNotExist(err) {
		r.t.Fatal(err)
	}
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

func (r *rig) wantCalls(want ...string) {
	r.t.Helper()
	if got := r.called(); !slices.Equal(got, want) {
		r.t.Errorf("the plugin was called:\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(want, "\n\t"))
	}
}

// wantNothing: no record, no result, no pin, no interface.
func (r *rig) wantNothing() {
	r.t.Helper()
	ids, err := r.List()
	if err != nil || len(ids) != 0 {
		r.t.Errorf("left: %q, %v", ids, err)
	}
	if n, err := look(r.netns); err == nil {
		r.t.Errorf("left an interface: %+v", n)
	}
}
