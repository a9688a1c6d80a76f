// Package attack has a hostile image attack its sandbox from inside, behind both walls, and shows for each attack that it
// succeeds where a test build leaves out the protection that should stop it.
package attack

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

var shared *harness.Daemon

func TestMain(m *testing.M) {
	code := harness.Main(m, "attack", []string{harness.Busybox}, func(d *harness.Daemon) { shared = d })
	if err := removeBuilt(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = 1
	}
	os.Exit(code)
}

const hostile = "hostile"

// Protections of pkg/weaken, most of them steps of the agent's tables.
const (
	filter     = "install the system call filter,filter the agent" // the second covers every stage too, and sets no_new_privs
	noNewPrivs = "forbid new privileges"
	caps       = "set capabilities,limit the bounding set,surrender capabilities"
)

// attacks that the payload carries out, in one workload each wall.
var attacks = []struct {
	name, cve string
	tries     string
	stops     string
	// The protections without which it succeeds, by wall; none where the wall itself is the protection, with the reason in stops.
	container, vm string
	user          string
	flags         []string
}{
	{name: "runtime-program", cve: "CVE-2019-5736", tries: "a handle to the program of PID 1, to overwrite it",
		stops: "PID 1 is undumpable, its program a sealed file nobody may read, and the workload has fewer capabilities", container: "be undumpable," + caps, vm: "be undumpable," + caps},
	{name: "descriptors", cve: "CVE-2024-21626", tries: "a descriptor the runtime left open",
		stops: "close_range in the stage", container: "close inherited descriptors", vm: "close inherited descriptors"},
	{name: "masked", cve: "CVE-2025-31133", tries: "what masks of /proc and /sys hide", stops: "masks, of a null device that is checked",
		container: "mask paths", vm: "mask paths"},
	{name: "kernel-settings", tries: "/proc/sys, /proc/irq and /sys, open for writing", stops: "read-only mounts of them; in a container also that they are the host's root's, so that leaving the mounts out gets nobody in",
		vm: "make paths read-only"},
	{name: "sysrq", tries: "/proc/sysrq-trigger, open for writing", stops: "a read-only mount; in a container also that the file is the host's root's, so that leaving the mount out gets nobody in",
		vm: "make paths read-only"},
	{name: "release-agent", cve: "CVE-2022-0492", tries: "a mount of a cgroup hierarchy, whose release_agent the kernel runs", stops: "no CAP_SYS_ADMIN, and the filter keeps user namespaces away, where one has it",
		container: filter, vm: filter},
	{name: "keyrings", tries: "add_key, request_key, keyctl", stops: "the filter", container: filter, vm: filter},
	{name: "user-namespaces", tries: "clone, clone3, setns, unshare", stops: "the filter", container: filter, vm: filter},
	{name: "mounts", tries: "every call that changes mounts, and open_by_handle_at", stops: "no CAP_SYS_ADMIN; the filter lets none through without it",
		container: filter + "," + caps, vm: filter + "," + caps},
	{name: "devices", tries: "device nodes of the image and of its own making", stops: "nodev mounts; in a container the cgroup's list of devices too (both are the daemon's: TestNegativeControls)",
		vm: "nodev"},
	{name: "trace-init", tries: "ptrace, memory, descriptors and links of PID 1", stops: "PID 1 is undumpable and the workload has fewer capabilities",
		container: "be undumpable," + caps, vm: "be undumpable," + caps},
	{name: "set-user-id", tries: "to become root by a set-user-id program of the image", stops: "no_new_privs",
		container: noNewPrivs + "," + filter, vm: noNewPrivs + "," + filter, user: "app"},
	{name: "file-capabilities", tries: "to get capabilities by a file that has them", stops: "no_new_privs",
		container: noNewPrivs + "," + filter, vm: noNewPrivs + "," + filter, user: "app"},
	{name: "fake-proc", cve: "CVE-2025-52881", tries: "a file system of its own at /proc", stops: "targets below /proc are refused, links to it when mounted (TestLinksInTheWayOfMounts; control: links in TestNegativeControls)"},
	{name: "fake-dev", cve: "CVE-2025-52565", tries: "links at /dev/null, /dev/console and /dev/tty that lead into /proc", stops: "/dev is a tmpfs; without it the start fails at the image's /dev/null (TestLinksInTheWayOfMounts)"},
	{name: "tmpfs-through-link", cve: "CVE-2021-30465", tries: "to lead a mount out of the root by a link", stops: "openat2 with RESOLVE_IN_ROOT, and mounts attached by descriptor; without it a container does not even start (links)",
		vm: "resolve inside the root", flags: []string{"--tmpfs", "/link-root/tmp"}},
	{name: "abstract-socket", tries: "an abstract Unix socket of the host", stops: "a network namespace, or kernel, of its own (control: the same program on the host)"},
	{name: "neighbour-socket", tries: "the socket of the daemon, by its path on the host and through /proc", stops: "a root of its own (control: the same program on the host)"},
	{name: "neighbour-agents", tries: "the sockets of other sandboxes' agents, by path and through /proc, vsock addresses and virtio ports",
		stops: "a root, or kernel, of its own; the daemon's directories are root's, and the filter has no vsock (TestNeighboursAgents)"},
	{name: "vsock", tries: "a vsock socket", stops: "the filter", container: filter, vm: filter},
}

// verdicts reads what the payload wrote.
func verdicts(t *testing.T, out string) map[string][2]string {
	t.Helper()
	found := map[string][2]string{}
	for line := range strings.Lines(out) {
		fields := strings.SplitN(strings.TrimSpace(line), "\t", 3)
		if len(fields) != 3 {
			t.Fatalf("the payload wrote %q", line)
		}
		found[fields[0]] = [2]string{fields[1], fields[2]}
	}
	return found
}

func environment(d *harness.Daemon, abstract string) []string {
	return []string{"-e", "ATTACK_ABSTRACT=" + abstract, "-e", "ATTACK_SOCKET=" + filepath.Join(d.RunDir, "sandboxd.sock")}
}

// listenAbstract is a service of the host's, with a name that is no file.
func listenAbstract(t *testing.T) string {
	t.Helper()
	name := fmt.Sprintf("sandboxd-attack-%d", os.Getpid())
	l, err := net.Listen("unix", "@"+name)
	harness.Must(t, err)
	t.Cleanup(func() { _ = l.Close() })
	return name
}

func importHostile(t *testing.T, d *harness.Daemon, archive string) {
	t.Helper()
	d.Call(t, "image", "import", "--name", hostile, archive)
}

// names of the attacks as one user.
func attacksOf(user string) []string {
	var names []string
	for _, a := range attacks {
		if a.user == user {
			names = append(names, a.name)
		}
	}
	return names
}

func TestAttacks(t *testing.T) {
	payload := buildPayload(t)
	importHostile(t, shared, hostileImage(t, payload))
	abstract := listenAbstract(t)
	harness.Both(t, shared, func(t *testing.T, w harness.Wall) {
		neighbours := "ATTACK_NEIGHBOURS="
		for _, iso := range harness.Isolations {
			neighbours += " " + strings.Join(socketsOf(t, w.Daemon, w.Daemon.Wall(iso).Start(t, hostile, "/attack", "sleep")), " ")
		}
		flags := append(environment(w.Daemon, abstract), "-e", neighbours, "--tmpfs", "/link-root/tmp")
		out := ""
		for _, user := range []string{"", "app"} {
			args := flags
			if user != "" {
				args = append(slices.Clone(flags), "-u", user)
			}
			r := w.Run(append(append(args, hostile, "/attack"), attacksOf(user)...)...).Run()
			r.Want(t, 0)
			out += r.Stdout
		}
		got := verdicts(t, out)
		for _, a := range attacks {
			switch v := got[a.name]; v[0] {
			case "blocked":
				t.Logf("%-20s blocked: %s", a.name, v[1])
			default:
				t.Errorf("%s (%s), to be stopped by %s: %s: %s", a.name, a.tries, a.stops, v[0], v[1])
			}
		}
		r := w.Run("--cap-add", "ALL", "-e", neighbours, hostile, "/attack", "neighbour-agents").Run()
		r.Want(t, 0)
		if v := verdicts(t, r.Stdout)["neighbour-agents"]; v[0] != "blocked" {
			t.Errorf("neighbours' agents, with all capabilities: %s", v[1])
		}
		attackInit(t, w)
		sealed(t, w)
		if v := evilExe(t, w); v[0] != "blocked" || !strings.Contains(v[1], "on its way in") {
			t.Errorf("the program of a process on its way in: %s: %s", v[0], v[1])
		}
	})
}

// socketsOf are the sockets that the daemon has for a sandbox.
func socketsOf(t *testing.T, d *harness.Daemon, id string) (sockets []string) {
	t.Helper()
	harness.Must(t, filepath.WalkDir(d.RunDir, func(path string, e os.DirEntry, err error) error {
		if err == nil && e.Type() == os.ModeSocket && strings.Contains(path, id) {
			sockets = append(sockets, path)
		}
		return err
	}))
	if len(sockets) == 0 {
		t.Fatalf("no socket of %s below %s", id, d.RunDir)
	}
	return sockets
}

// attackInit: PID 1 survives what the workload sends it, and goes on.
func attackInit(t *testing.T, w harness.Wall) {
	t.Helper()
	id := w.Start(t, hostile, "/attack", "sleep")
	w.Exec(id, "/attack", "signal-init").Run().Want(t, 0)
	w.Exec(id, "/attack", "euid").Run().WantOut(t, "0\n")
	if v := w.Inspect(t, id); v.Status.State != "WORKLOAD_STATE_RUNNING" {
		t.Errorf("after signals to PID 1 it is %s: %s", v.Status.State, v.Status.Message)
	}
	workdirs(t, w, id)
}

// evilExe has the runtime execute, by a link of the image, what it is itself, while a process inside reaches for the program of
// whatever starts (CVE-2019-5736), and answers with how that went.
func evilExe(t *testing.T, w harness.Wall) [2]string {
	t.Helper()
	id := w.Start(t, hostile, "/attack", "sleep")
	args := []string{"exec", "-e", "ATTACK_WATCH_MS=1500"}
	if w.Isolation == "vm" {
		args = append(args, "-e", "ATTACK_READABLE=1")
	}
	watched := make(chan harness.Result, 1)
	go func() { watched <- w.Command(append(args, id, "/attack", "runtime-program")...).Run() }()
	for {
		select {
		case r := <-watched:
			r.Want(t, 0)
			return verdicts(t, r.Stdout)["runtime-program"]
		default:
			w.Exec(id, "/evil-exe").Run()
		}
	}
}

// Descriptors that an agent may have open, as names in /proc.
const firstDescriptor, lastDescriptor = 3, 24

// workdirNames are the image's links and the names in /proc to what whoever enters a working directory has open (CVE-2024-21626).
func workdirNames() []string {
	names := []string{"/evil-cwd", "/evil-fd", "/proc/self/cwd", "/proc/thread-self/cwd", "/evil-cwd/../proc/self/cwd"}
	for fd := firstDescriptor; fd < lastDescriptor; fd++ {
		names = append(names, fmt.Sprint("/proc/self/fd/", fd))
	}
	return names
}

// workdirs: none of them leads anywhere outside, neither for the workload's own process nor for another.
func workdirs(t *testing.T, w harness.Wall, id string) {
	t.Helper()
	refused := func(what string, r harness.Result) {
		if r.Code == 0 {
			if v := verdicts(t, r.Stdout)["workdir"]; v[0] != "blocked" {
				t.Errorf("%s: %q", what, r.Stdout)
			}
			return // it was a directory inside
		}
		if r.Code != 125 || !strings.Contains(r.Stderr, "working directory") {
			t.Errorf("%s: exit code %d, %q", what, r.Code, r.Stderr)
		}
	}
	for _, dir := range workdirNames() {
		refused("exec in "+dir, w.Command("exec", "-w", dir, id, "/attack", "workdir").Run())
	}
	for _, dir := range []string{"/evil-cwd", "/evil-fd", "/proc/self/cwd"} {
		refused("a workload in "+dir, w.Run("-w", dir, hostile, "/attack", "workdir").Run())
		if w.Isolation == "vm" {
			break // one start is enough: it is the same code
		}
	}
	for _, dir := range []string{"/evil-cwd", "/proc/self/cwd"} { // outside, beyond doubt
		if r := w.Command("exec", "-w", dir, id, "/attack", "workdir").Run(); r.Code != 125 || !strings.Contains(r.Stderr, "outside the root") {
			t.Errorf("exec in %s: exit code %d, %q", dir, r.Code, r.Stderr)
		}
	}
}

// What keeps a sandbox from a neighbour's agent, left out: a container that was not moved into its root connects, where the daemon's
// directories let it, and so does root on the host to the agent in either wall.
func TestNeighboursAgents(t *testing.T) {
	payload := buildPayload(t)
	d := weakDaemon(t, buildWeak(t), "")
	importHostile(t, d, hostileImage(t, payload))
	for _, iso := range harness.Isolations {
		t.Run(iso, func(t *testing.T) {
			sockets := socketsOf(t, d, d.Wall(iso).Start(t, hostile, "/attack", "sleep"))
			neighbours := "ATTACK_NEIGHBOURS=" + strings.Join(sockets, " ")
			if iso == "container" {
				_, program := hostFile(t, payload)
				run := func() [2]string {
					r := d.Wall(iso).Run("-w", "/", "-e", weakenVariable+"=enter the root", "-e", neighbours, hostile, program, "neighbour-agents").Run()
					r.Want(t, 0)
					return verdicts(t, r.Stdout)["neighbour-agents"]
				}
				if v := run(); v[0] != "blocked" || !strings.Contains(v[1], "EACCES") {
					t.Errorf("outside of its root, by the modes of directories: %s: %s", v[0], v[1])
				}
				openTo(t, d.RunDir, sockets)
				if v := run(); v[0] != "succeeded" {
					t.Errorf("outside of its root, with open directories: %s: %s", v[0], v[1])
				}
			}
			out, err := harness.Output(commandWith(payload, []string{neighbours}, "neighbour-agents"))
			harness.Must(t, err)
			if v := verdicts(t, string(out))["neighbour-agents"]; v[0] != "succeeded" {
				t.Errorf("on the host: %s: %s", v[0], v[1])
			}
		})
	}
}

// openTo lets everybody reach sockets below dir.
func openTo(t *testing.T, dir string, sockets []string) {
	t.Helper()
	for _, path := range sockets {
		harness.Must(t, os.Chmod(path, 0o666))
		for path != dir {
			path = filepath.Dir(path)
			harness.Must(t, os.Chmod(path, 0o755))
		}
	}
}

// An attack on the host itself succeeds: the payload can do what it says.
func TestAttacksSucceedWithoutASandbox(t *testing.T) {
	payload := buildPayload(t)
	abstract := listenAbstract(t)
	cmd := commandWith(payload, []string{"ATTACK_ABSTRACT=" + abstract, "ATTACK_SOCKET=" + filepath.Join(shared.RunDir, "sandboxd.sock")},
		"abstract-socket", "neighbour-socket", "masked")
	out, err := harness.Output(cmd)
	harness.Must(t, err)
	for name, v := range verdicts(t, string(out)) {
		if v[0] != "succeeded" {
			t.Errorf("%s without any wall: %s: %s", name, v[0], v[1])
		}
	}
}
