package agent_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// in does something to the image before the container is made of it.
func in(t *testing.T, do func(root string) error) option {
	return func(_ *specs.Spec, root string) {
		if err := do(root); err != nil {
			t.Fatal(err)
		}
	}
}

func replaceByLink(name, target string) func(string) error {
	return func(root string) error {
		if err := os.RemoveAll(filepath.Join(root, name)); err != nil {
			return err
		}
		return os.Symlink(target, filepath.Join(root, name))
	}
}

// TestImageLinksAreRefused: a link where a protection belongs ends the start, before anything has run.
func TestImageLinksAreRefused(t *testing.T) {
	for name, target := range map[string]string{"proc": "/etc", "dev": "tmp", "sys": "../../../tmp"} {
		s := bootSandbox(t)
		if err := replaceByLink(name, target)(s.rootfs); err != nil {
			t.Fatal(err)
		}
		chownTree(t, s.rootfs)
		err := s.CreateContainer(t.Context(), agent.Container{ID: theContainer, Config: testConfig()})
		if err == nil || !strings.Contains(err.Error(), "/"+name) {
			t.Errorf("/%s -> %s: got %v", name, target, err)
		}
		// What is half made is no container: nothing may run, and a second attempt does not pass for a first.
		if err := s.CreateContainer(t.Context(), agent.Container{ID: theContainer, Config: testConfig()}); spec.KindOf(err) != spec.KindWrongState {
			t.Errorf("a second attempt: %v", err)
		}
		s.base = testConfig().Process
		if _, err := s.start(process{args: []string{"true"}}); spec.KindOf(err) != spec.KindWrongState {
			t.Errorf("a process in what is half made: %v", err)
		}
	}
}

// TestWorkdirThatCannotBe: the workload's own working directory is made with the root; where it cannot be, that is said of what
// was asked for, and not of the host.
func TestWorkdirThatCannotBe(t *testing.T) {
	for name, cwd := range map[string]string{
		"outside, by a link": "/evil-cwd", "below a file": "/etc/passwd/dir", "up": "/none/../dir", "in a circle": "/round", "too long": "/" + strings.Repeat("x", 300),
	} {
		s := bootSandbox(t)
		for _, link := range [][2]string{{"evil-cwd", "/proc/self/cwd"}, {"round", "/round"}} {
			if err := os.Symlink(link[1], filepath.Join(s.rootfs, link[0])); err != nil {
				t.Fatal(err)
			}
		}
		chownTree(t, s.rootfs)
		config := testConfig()
		config.Process.Cwd = cwd
		err := s.CreateContainer(t.Context(), agent.Container{ID: theContainer, Config: config})
		if spec.KindOf(err) != spec.KindInvalid || !strings.Contains(err.Error(), "cannot make the working directory: "+cwd) {
			t.Errorf("%s: %v (%v)", name, err, spec.KindOf(err))
		}
	}
}

// TestImageLinksStayInside: links of the image lead to the image, wherever they point.
func TestImageLinksStayInside(t *testing.T) {
	outside := t.TempDir()
	s := newSandbox(t,
		in(t, replaceByLink("etc/hosts", outside+"/hosts")),
		in(t, replaceByLink("etc/resolv.conf", "../../../../../../"+outside+"/resolv.conf")),
		in(t, replaceByLink("run", "/tmp")),
		func(c *specs.Spec, _ string) {
			c.Mounts = append(c.Mounts, specs.Mount{Destination: "/run/inner", Type: "tmpfs", Source: "tmpfs", Options: []string{"mode=700"}})
			c.Process.Cwd = "/run/work"
		})
	if got := s.sh("[ -L /etc/hosts ] || grep -c localhost /etc/hosts; stat -c %a /tmp/inner; stat -c %F /tmp/work"); got != "2\n700\ndirectory" {
		t.Errorf("inside: %q", got)
	}
	if left, err := os.ReadDir(outside); err != nil || len(left) > 0 {
		t.Errorf("outside: %v %v", left, err)
	}
}

// TestImageUserFiles: what stands where the user files should be.
func TestImageUserFiles(t *testing.T) {
	for name, do := range map[string]func(string) error{
		"missing": func(root string) error { return os.Remove(filepath.Join(root, "etc/passwd")) },
		"empty":   func(root string) error { return os.WriteFile(filepath.Join(root, "etc/passwd"), nil, 0o644) },
		"garbage": func(root string) error {
			return os.WriteFile(filepath.Join(root, "etc/passwd"), []byte("\x00\xff:::::\n:\n\n::0::\nuser:x:99999999999:0::/:\n"), 0o644)
		},
		"loop": replaceByLink("etc/passwd", "passwd"),
		"directory": func(root string) error {
			_ = os.Remove(filepath.Join(root, "etc/passwd"))
			return os.Mkdir(filepath.Join(root, "etc/passwd"), 0o755)
		},
	} {
		s := newSandbox(t, in(t, do))
		_, err := s.start(process{args: []string{"true"}, user: "user"})
		if spec.KindOf(err) != spec.KindInvalid || err.(*spec.Error).Field != "process.user" {
			t.Errorf("%s: by name: %v", name, err)
		}
		if name == "loop" || name == "directory" {
			continue // not readable: not ignored
		}
		if r := s.run(process{args: []string{"sh", "-c", "id -u; echo $HOME"}, user: "1234:5"}); r.stdout != "1234\n/\n" {
			t.Errorf("%s: by number: %+v", name, r)
		}
	}
}

// TestConfigRefused: what a configuration can ask for and this agent does not do is refused, not left out.
func TestConfigRefused(t *testing.T) {
	for name, edit := range map[string]func(*specs.Spec){
		"mount type": func(c *specs.Spec) {
			c.Mounts = append(c.Mounts, specs.Mount{Destination: "/x", Type: "nfs", Source: "h:/"})
		},
		"mount option":  func(c *specs.Spec) { c.Mounts[0].Options = append(c.Mounts[0].Options, "nosuchoption") },
		"relative":      func(c *specs.Spec) { c.Mounts = append(c.Mounts, specs.Mount{Destination: "x", Type: "tmpfs"}) },
		"hooks":         func(c *specs.Spec) { c.Hooks = &specs.Hooks{} },
		"devices":       func(c *specs.Spec) { c.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/kvm"}} },
		"sysctl":        func(c *specs.Spec) { c.Linux.Sysctl = map[string]string{"kernel.nosuch": "1"} },
		"host's sysctl": func(c *specs.Spec) { c.Linux.Sysctl = map[string]string{"kernel.panic": "1"} },
		"no linux":      func(c *specs.Spec) { c.Linux = nil },
	} {
		s := bootSandbox(t)
		chownTree(t, s.rootfs)
		config := testConfig()
		edit(config)
		if err := s.CreateContainer(t.Context(), agent.Container{ID: theContainer, Config: config}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestSysctl(t *testing.T) {
	s := newSandbox(t, func(c *specs.Spec, _ string) {
		c.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "80"}
	})
	if got := s.sh("cat /proc/sys/net/ipv4/ip_unprivileged_port_start"); got != "80" {
		t.Errorf("got %q", got)
	}
}

// TestConfinementIsFatal: a step that can't be done ends the start, with what failed.
func TestConfinementIsFatal(t *testing.T) {
	s := newSandbox(t)
	for name, c := range map[string]struct {
		edit func(*specs.Process)
		says string
	}{
		"capability outside the bounding set": {func(p *specs.Process) {
			caps := *p.Capabilities
			caps.Effective = append(caps.Effective[:len(caps.Effective):len(caps.Effective)], "CAP_SYS_ADMIN")
			caps.Permitted, caps.Bounding = caps.Effective, caps.Effective
			p.Capabilities = &caps
		}, "set capabilities"},
		"filter without no_new_privs": {func(p *specs.Process) { p.NoNewPrivileges = false }, "filter"},
		"limit above the hard one": {func(p *specs.Process) {
			p.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 1 << 40, Hard: 1 << 40}}
		}, "resource limits"},
		"group outside the range": {func(p *specs.Process) { p.User = specs.User{GID: 70000} }, "become the user"},
	} {
		_, err := s.start(process{args: []string{"true"}, edit: c.edit})
		if spec.KindOf(err) != spec.KindInternal || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if _, err := s.start(process{args: []string{"true"}, user: "70000"}); spec.KindOf(err) != spec.KindInvalid {
		t.Errorf("user outside the range: %v", err)
	}
	if got := s.sh("echo alive; cat /proc/[0-9]*/cmdline | grep -c stag[e] || true"); got != "alive\n0" {
		t.Errorf("afterwards: %q", got)
	}
}
