package attack

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

const weakenVariable = "SANDBOXD_WEAKEN"

func commandWith(program string, env []string, args ...string) *exec.Cmd {
	cmd := exec.Command(program, args...)
	cmd.Env = append(os.Environ(), env...)
	return cmd
}

// weakDaemon is a test build, with the daemon's own protections host left out; it has the hostile image.
func weakDaemon(t *testing.T, bin string, host string) *harness.Daemon {
	t.Helper()
	d, err := harness.NewDaemon("weak")
	harness.Must(t, err)
	t.Cleanup(func() {
		if err := d.Remove(); err != nil {
			t.Error(err)
		}
	})
	d.Program, d.Env = filepath.Join(bin, "sandboxd"), []string{weakenVariable + "=" + host}
	d.MustStart(t)
	return d
}

func buildWeak(t *testing.T) string {
	t.Helper()
	return buildOnce(t, []string{"build", "-tags", "sandboxd_weaken"}, "./cmd/sandboxd", "./cmd/sandbox-agent", "./cmd/sandbox-vsock")
}

// Each attack succeeds where what should stop it is left out, so its being blocked elsewhere is that protection's work.
func TestNegativeControls(t *testing.T) {
	bin := buildWeak(t)
	d := weakDaemon(t, bin, "seal the agent,nodev,list of devices")
	importHostile(t, d, hostileImage(t, buildPayload(t)))
	for _, iso := range harness.Isolations {
		t.Run(iso, func(t *testing.T) {
			w := d.Wall(iso)
			// One start for all attacks that the same protections stop.
			type group struct{ without, user, flags string }
			groups := map[group][]string{}
			for _, a := range attacks {
				without := a.container
				if iso == "vm" {
					without = a.vm
				}
				if without != "" {
					g := group{without, a.user, strings.Join(a.flags, " ")}
					groups[g] = append(groups[g], a.name)
				}
			}
			if iso == "container" {
				g := group{"nodev", "", ""}
				groups[g] = append(groups[g], "devices")
			}
			for g, names := range groups {
				args := append([]string{"-e", weakenVariable + "=" + g.without}, strings.Fields(g.flags)...)
				if g.user != "" {
					args = append(args, "-u", g.user)
				}
				r := w.Run(append(append(args, hostile, "/attack"), names...)...).Run()
				if r.Code != 0 {
					t.Errorf("without %s: exit code %d: %s", g.without, r.Code, r.Stderr)
					continue
				}
				got := verdicts(t, r.Stdout)
				for _, name := range names {
					if v := got[name]; v[0] != "succeeded" {
						t.Errorf("%s without %q: %s: %s", name, g.without, v[0], v[1])
					}
				}
			}
			r := w.Run("-e", weakenVariable+"=check the working directory", "-w", "/proc/self/cwd", hostile, "/attack", "workdir").Run()
			if !strings.Contains(r.Stdout, "succeeded") {
				t.Errorf("a working directory outside, unchecked: exit code %d, %q, %q", r.Code, r.Stdout, r.Stderr)
			}
			links(t, w)
			initControls(t, w)
		})
	}
}

// initControls: what keeps PID 1 alive, and closed to who might trace it, each left out alone. The daemon's program is not sealed.
func initControls(t *testing.T, w harness.Wall) {
	t.Helper()
	id := w.Start(t, "-e", weakenVariable+"=take signals,check the working directory", hostile, "/attack", "sleep")
	workdirControls(t, w, id)
	w.Exec(id, "/attack", "signal-init").Run()
	harness.Eventually(t, harness.LogTimeout, "PID 1 that takes no signals ends by one", func() (bool, string) {
		v := w.Inspect(t, id)
		return v.Status.State == "WORKLOAD_STATE_FAILED", v.Status.State
	})

	closed := func(what string, want []string, flags ...string) {
		t.Helper()
		wantFired(t, what, w.Run(append(flags, hostile, "/attack", "agent-open", "trace-init")...).Run(), want...)
	}
	// What PID 1 has open, root may list, where nothing but undumpable is against that.
	listed, open := []string{"agent-open"}, []string{"agent-open", "trace-init"}
	if w.Isolation == "container" {
		if v := evilExe(t, w); v[0] != "succeeded" {
			t.Errorf("the program of an agent that is not sealed: %s: %s", v[0], v[1])
		}
		// As many capabilities as the agent has left, so that these do not stop it.
		same := []string{"--cap-add", "DAC_READ_SEARCH"}
		closed("an agent that is not sealed", listed, same...)
		closed("one that is dumpable too", open, append(same, "-e", weakenVariable+"=be undumpable")...)
		closed("one that is not sealed, to who may trace", open, "--cap-add", "SYS_PTRACE")
		return
	}
	same := []string{"--cap-add", "ALL", "--cap-drop", "SYS_PTRACE", "-e"}
	closed("an agent that may not trace either", listed, append(same, weakenVariable+"=hold the right to trace")...)
	closed("one that is dumpable too", open, append(same, weakenVariable+"=hold the right to trace,be undumpable")...)
}

// workdirControls: where the working directory is not checked, each kind of name leads outside: the links of /proc to a working
// directory, one of the image's to them, a descriptor that is left open, and a link to that.
func workdirControls(t *testing.T, w harness.Wall, id string) {
	t.Helper()
	outside := func(dir string) bool {
		without := weakenVariable + "=check the working directory,close inherited descriptors" // which leaves one open
		return strings.Contains(w.Command("exec", "-w", dir, "-e", without, id, "/attack", "workdir").Run().Stdout, "succeeded")
	}
	for _, dir := range []string{"/evil-cwd", "/proc/self/cwd", "/proc/thread-self/cwd"} {
		if !outside(dir) {
			t.Errorf("exec in %s, unchecked, is not outside", dir)
		}
	}
	fd := firstDescriptor
	for fd < lastDescriptor && !outside(fmt.Sprint("/proc/self/fd/", fd)) {
		fd++
	}
	if fd == lastDescriptor {
		t.Fatalf("none of the agent's descriptors %d to %d leads outside", firstDescriptor, lastDescriptor)
	}
	links := filepath.Join(t.TempDir(), "links")
	harness.Must(t, os.Mkdir(links, 0o755))
	harness.Must(t, os.Symlink(fmt.Sprint("/proc/self/fd/", fd), filepath.Join(links, "fd")))
	w.Daemon.Call(t, "cp", links, id+":/")
	if !outside("/links/fd") {
		t.Errorf("exec in a link to descriptor %d, unchecked, is not outside", fd)
	}
}

// sealed: with its program sealed, and so unreadable, an agent is closed also to who may trace, or is as much as it. A guest's gives
// root who is as much as it but for that no memory, no trace and no descriptor; what each of its two protections does alone, initControls shows.
func sealed(t *testing.T, w harness.Wall) {
	t.Helper()
	flags, fires := [][]string{{"--cap-add", "SYS_PTRACE"}, {"--cap-add", "DAC_READ_SEARCH"}}, []string{}
	if w.Isolation == "vm" {
		// Nothing is sealed there: root with every capability but the one that it is about may count what PID 1 has open.
		flags, fires = [][]string{{"--cap-add", "ALL", "--cap-drop", "SYS_PTRACE"}}, []string{"agent-open"}
	}
	for _, f := range flags {
		wantFired(t, fmt.Sprint("an agent as it is, ", f), w.Run(append(f, hostile, "/attack", "agent-open", "trace-init")...).Run(), fires...)
	}
}

// links: what leaving out the checks of mounts leads to. That both are refused by a whole build is TestLinksInTheWayOfMounts.
func links(t *testing.T, w harness.Wall) {
	t.Helper()
	// Kernel parameters can't be set by what then lies there, and the start would fail at that.
	r := w.Run("-e", weakenVariable+"=check that proc is proc,set kernel parameters", "--tmpfs", "/link-proc", hostile, "/attack", "fake-proc").Run()
	if r.Code != 0 || verdicts(t, r.Stdout)["fake-proc"][0] != "succeeded" {
		t.Errorf("a tmpfs at /proc, unchecked: exit code %d, %q, %q", r.Code, r.Stdout, r.Stderr)
	}
	if w.Isolation == "container" {
		// The agent is led to the host's own /etc, where it is nobody.
		r = w.Run("-e", weakenVariable+"=resolve inside the root", hostile, "/attack", "workdir").Run()
		if r.Code != 125 || !strings.Contains(r.Stderr, "/etc") || !strings.Contains(r.Stderr, "denied") {
			t.Errorf("paths resolved outside: exit code %d, %q, %q", r.Code, r.Stdout, r.Stderr)
		}
	}
	// Another wall behind the first: the image's own /dev/null is in the way.
	r = w.Run("-e", weakenVariable+"=/dev", hostile, "/attack", "fake-dev").Run()
	if r.Code == 0 || !strings.Contains(r.Stderr, "null") {
		t.Errorf("the image's own /dev: exit code %d, %q, %q", r.Code, r.Stdout, r.Stderr)
	}
}

// A link of the image where a mount is to go must not lead the mount onto what protections rest on.
func TestLinksInTheWayOfMounts(t *testing.T) {
	importHostile(t, shared, hostileImage(t, buildPayload(t)))
	harness.Both(t, shared, func(t *testing.T, w harness.Wall) {
		r := w.Run("--tmpfs", "/link-proc", hostile, "/attack", "fake-proc").Run()
		if r.Code != 125 || !strings.Contains(r.Stderr, "file system") {
			t.Errorf("a tmpfs on a link to /proc: exit code %d, %q, %q", r.Code, r.Stdout, r.Stderr)
		}
	})
}

// Directories that others could have put there are refused: root would write where they like.
func TestLinkedDirectories(t *testing.T) {
	bin := buildWeak(t)
	for _, c := range []struct {
		what string
		make func(t *testing.T, dir string)
	}{
		{"a link", func(t *testing.T, dir string) { harness.Must(t, os.Symlink(t.TempDir(), dir)) }},
		{"one that others write to", func(t *testing.T, dir string) {
			harness.Must(t, os.Mkdir(dir, 0o700))
			harness.Must(t, os.Chmod(dir, 0o777))
		}},
	} {
		t.Run(c.what, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "state")
			c.make(t, dir)
			for _, weak := range []bool{false, true} {
				d, err := harness.NewDaemon("linked", "--state-dir", dir)
				harness.Must(t, err)
				if weak {
					d.Program, d.Env = filepath.Join(bin, "sandboxd"), []string{weakenVariable + "=check directories"}
				}
				err = d.Start()
				if !weak && (err == nil || !strings.Contains(err.Error(), "cannot use directory")) {
					t.Errorf("started: %v", err)
				}
				if weak && err != nil {
					t.Errorf("without the check: %v", err)
				}
				harness.Must(t, d.Terminate())
				_ = d.Discard() // its group exists only where it ran
			}
		})
	}
}

// What a test build can leave out is in no other build. That the test can find it, the test build shows.
func TestProductionIsWhole(t *testing.T) {
	has := func(path string) bool {
		b, err := os.ReadFile(path)
		harness.Must(t, err)
		return bytes.Contains(b, []byte(weakenVariable))
	}
	bin := buildWeak(t)
	for _, name := range []string{"sandboxd", "sandbox-agent"} {
		if !has(filepath.Join(bin, name)) {
			t.Errorf("the test build of %s has no %s: the test finds nothing", name, weakenVariable)
		}
	}
	programs, err := filepath.Glob(filepath.Join(harness.Root, "bin/*"))
	harness.Must(t, errors.Join(err))
	if !slices.ContainsFunc(programs, func(p string) bool { return filepath.Base(p) == "sandboxd" }) {
		t.Fatal("no bin/sandboxd: run make build")
	}
	for _, p := range programs {
		if has(p) {
			t.Errorf("%s can do without protections", p)
		}
	}
}
