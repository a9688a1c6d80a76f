package attack

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// Who takes a step: each is left out in another way.
const (
	byDaemon  = "daemon"  // before there is a process
	byAgent   = "agent"   // once for the sandbox
	byProcess = "process" // for each process
)

// step of a sandbox's confinement, and what is seen from inside when it alone is left out.
type step struct {
	name, by string
	// Exactly these of the checks fire; or the start fails, and says so.
	fires string
	fails string
	// As whom the checks run; root by default.
	user string
	// What else must be left out, since it stops the same, and what fires without that alone.
	beside, besideFires string
	// What a VM does with it: nothing, or the same, or something of its own.
	vm string
}

const (
	vmSame = "same"
	vmNone = "" // the step is of a container only
	app    = "app"
)

// confinementSteps are docs/container.md as a table: TestEveryStepHasAControl sees to it that no step of the code is missing.
var confinementSteps = []step{
	{name: "user namespace", by: byDaemon, fails: "cannot show image with the sandbox's ids"},
	{name: "pid namespace", by: byDaemon, fails: "cannot start sandbox"},
	{name: "mount namespace", by: byDaemon, fails: "cannot make mounts private"},
	{name: "network namespace", by: byDaemon, fails: "/sys"},
	{name: "ipc namespace", by: byDaemon, fails: "mqueue"},
	{name: "uts namespace", by: byDaemon, fails: "host name"},
	{name: "cgroup namespace", by: byDaemon, fires: "namespaces"},
	{name: "ids of its own", by: byDaemon, fires: "ids"},
	{name: "limits of the cgroup", by: byDaemon, fires: "pids-limit"},
	{name: "list of devices", by: byDaemon, fires: "devices", beside: "nodev"},
	{name: "nodev", by: byDaemon, fires: "devices", beside: "list of devices"},

	{name: "make mounts private", by: byAgent, fires: "propagation"},
	{name: "/dev/shm", by: byAgent, fires: "fresh-filesystems", vm: vmSame},
	{name: "/dev/mqueue", by: byAgent, fires: "fresh-filesystems", vm: vmSame},
	{name: "/dev/pts", by: byAgent, fires: "fresh-filesystems"},
	{name: "/sys", by: byAgent, fires: "fresh-filesystems mount-attributes"},
	{name: "/proc", by: byAgent, fails: "/proc"},
	{name: "/dev", by: byAgent, fails: "null"},
	{name: "attributes of mounts", by: byAgent, fires: "mount-attributes", vm: "mount-attributes devices"},
	{name: "hide processes", by: byAgent, fires: "hidden", user: app, vm: vmSame},
	{name: "make device nodes", by: byAgent, fails: "null"},
	{name: "make paths read-only", by: byAgent, fires: "read-only-paths", vm: "read-only-paths kernel-settings sysrq"},
	{name: "mask paths", by: byAgent, fires: "masked", vm: vmSame},
	{name: "make the root read-only", by: byAgent, fires: "read-only-root", vm: vmSame},
	{name: "enter the root", by: byAgent, fires: "host-file"},
	{name: "surrender capabilities", by: byAgent, fires: "agent-capabilities"},
	{name: "filter the agent", by: byAgent, fires: "agent-filter own-filter", vm: vmSame},

	{name: "close inherited descriptors", by: byProcess, fires: "descriptors", vm: vmSame},
	{name: "start a session", by: byProcess, fires: "session", vm: vmSame},
	{name: "find the user", by: byProcess, fails: "agent has ended", user: app},
	{name: "enter the working directory", by: byProcess, fires: "workdir", vm: vmSame},
	{name: "set resource limits", by: byProcess, fires: "limits", vm: vmSame},
	{name: "limit the bounding set", by: byProcess, fires: "bounding", vm: vmSame},
	{name: "become the user", by: byProcess, fires: "user no-capabilities hidden", user: app, vm: vmSame},
	{name: "set the umask", by: byProcess, fires: "umask", vm: vmSame},
	{name: "reset signals", by: byProcess, fires: "signals", vm: vmSame},
	{name: "forbid new privileges", by: byProcess, fails: "cannot install the system call filter: ", beside: "filter the agent", besideFires: "agent-filter own-filter"},
	{name: "install the system call filter", by: byProcess, fires: "own-filter", vm: vmSame},
}

// Checks that no attack of the same sandbox would disturb.
var (
	rootChecks = []string{"pids-limit", "propagation", "fresh-filesystems", "mount-attributes", "read-only-paths", "kernel-settings", "sysrq",
		"read-only-root", "masked", "host-file", "agent-filter", "descriptors", "session", "workdir", "limits", "bounding", "capabilities", "umask",
		"signals", "no-new-privileges", "own-filter", "devices"}
	appChecks = []string{"hidden", "user", "no-capabilities", "session", "workdir", "umask", "no-new-privileges"}
)

func checksOf(user, isolation string) []string {
	switch {
	case user == app:
		return appChecks
	case isolation == "container":
		// A guest needs no namespaces, and its agent keeps its capabilities.
		return append(slices.Clone(rootChecks), "namespaces", "ids", "agent-capabilities")
	default:
		return rootChecks
	}
}

// confinedFlags ask for what the checks expect.
func confinedFlags(w harness.Wall, hostFile string) []string {
	flags := []string{"--read-only", "--tmpfs", "/tmp", "-w", "/nodes", "--pids", "64", "--ulimit", "core=777",
		"-e", "ATTACK_CORE=777", "-e", "ATTACK_FILTERS=2", "-e", "ATTACK_HOST_FILE=" + hostFile,
		"-e", "ATTACK_CAPS=00000000a80425fb"} // docker's set: capabilities(7)
	if w.Isolation == "container" {
		flags = append(flags, "-e", "ATTACK_NAMESPACES="+strings.Join(ownNamespaces(), " "))
	}
	return flags
}

// ownNamespaces are the daemon's too.
func ownNamespaces() []string {
	var all []string
	for _, kind := range []string{"user", "pid", "mnt", "net", "ipc", "uts", "cgroup"} {
		if link, err := os.Readlink("/proc/self/ns/" + kind); err == nil {
			all = append(all, link)
		}
	}
	return all
}

// hostFile is something that everybody on the host may read, in a directory that nobody is kept out of, and beside it a copy of
// the payload.
func hostFile(t *testing.T, payload string) (file, program string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "sandboxd-attack-")
	harness.Must(t, err)
	t.Cleanup(func() { harness.Must(t, os.RemoveAll(dir)) })
	harness.Must(t, os.Chmod(dir, 0o755))
	b, err := os.ReadFile(payload)
	harness.Must(t, err)
	file, program = filepath.Join(dir, "file"), filepath.Join(dir, "attack")
	harness.Must(t, os.WriteFile(file, []byte("x"), 0o644))
	harness.Must(t, os.WriteFile(program, b, 0o755))
	return file, program
}

func fired(t *testing.T, r harness.Result) []string {
	t.Helper()
	if r.Code != 0 {
		t.Errorf("exit code %d: %s", r.Code, r.Stderr)
	}
	var names []string
	for name, v := range verdicts(t, r.Stdout) {
		if v[0] == "succeeded" {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

func wantFired(t *testing.T, what string, r harness.Result, want ...string) {
	t.Helper()
	slices.Sort(want)
	want = slices.Compact(want)
	got := fired(t, r)
	if slices.Equal(got, want) {
		return
	}
	t.Errorf("%s: %q fire, want %q", what, got, want)
	for name, v := range verdicts(t, r.Stdout) {
		if slices.Contains(got, name) != slices.Contains(want, name) {
			t.Errorf("%s: %s", name, v[1])
		}
	}
}

// Of a sandbox as it is, every check finds what it should.
func TestConfinement(t *testing.T) {
	payload := buildPayload(t)
	importHostile(t, shared, hostileImage(t, payload))
	file, _ := hostFile(t, payload)
	harness.Both(t, shared, func(t *testing.T, w harness.Wall) {
		id := w.Start(t, append(confinedFlags(w, file), hostile, "/attack", "sleep")...)
		for _, user := range []string{"root", app} {
			checks := checksOf(user, w.Isolation)
			wantFired(t, "as "+user, w.Command(append([]string{"exec", "-u", user, id, "/attack"}, checks...)...).Run())
		}
	})
}

// weakened is a test build whose daemon leaves out what a file says at the moment. It runs where mounts are shared and signals
// ignored, as some hosts have it, so that confinement has something to do.
func weakened(t *testing.T) (d *harness.Daemon, without func(names ...string)) {
	t.Helper()
	bin := buildWeak(t)
	list := filepath.Join(t.TempDir(), "without")
	without = func(names ...string) {
		harness.Must(t, os.WriteFile(list, []byte(strings.Join(names, ",")), 0o600))
	}
	without()
	wrapper := filepath.Join(bin, "sandboxd-there")
	script := fmt.Sprintf("#!/bin/sh\ntrap '' TSTP TTIN TTOU\nexec unshare -m --propagation shared %s \"$@\"\n", filepath.Join(bin, "sandboxd"))
	harness.Must(t, os.WriteFile(wrapper, []byte(script), 0o755))
	d, err := harness.NewDaemon("weakened")
	harness.Must(t, err)
	t.Cleanup(func() {
		without()
		if err := d.Remove(); err != nil {
			t.Error(err)
		}
	})
	d.Program, d.Env = wrapper, []string{weakenVariable + "=@" + list}
	d.MustStart(t)
	return d, without
}

// One step after another is left out, and exactly the checks fire that are there for it.
func TestConfinementMatrix(t *testing.T) {
	payload := buildPayload(t)
	d, without := weakened(t)
	importHostile(t, d, hostileImage(t, payload))
	file, program := hostFile(t, payload)
	t.Run("container", func(t *testing.T) {
		w := d.Wall("container")
		flags := confinedFlags(w, file)
		for _, s := range confinementSteps {
			command, checks := "/attack", checksOf(s.user, w.Isolation)
			flags := flags
			if s.name == "enter the root" { // of the image there is nothing then
				command, checks, flags = program, []string{"host-file"}, append(slices.Clone(flags), "-w", "/")
			}
			run := func(names ...string) harness.Result {
				args := slices.Clone(flags)
				if s.by == byDaemon {
					without(names...)
				} else {
					without()
					args = append(args, "-e", weakenVariable+"="+strings.Join(names, ","))
				}
				if s.user != "" {
					args = append(args, "-u", s.user)
				}
				return w.Run(append(append(args, hostile, command), checks...)...).Run()
			}
			if s.beside != "" {
				wantFired(t, "without "+s.beside+" alone", run(s.beside), strings.Fields(s.besideFires)...)
			}
			r := run(s.name, s.beside)
			if s.fails != "" {
				if r.Code != 125 || !strings.Contains(r.Stderr, s.fails) {
					t.Errorf("without %q: exit code %d, %q, want a failure that says %q", s.name, r.Code, r.Stderr, s.fails)
				}
				continue
			}
			wantFired(t, "without "+s.name, r, strings.Fields(s.fires)...)
		}
		without()
	})
	t.Run("vm", func(t *testing.T) { matrixInVM(t, d.Wall("vm"), file) })
}

// matrixInVM takes few starts: what the agent does is left out at once, what is done for each process in execs.
func matrixInVM(t *testing.T, w harness.Wall, file string) {
	t.Helper()
	flags := confinedFlags(w, file)
	start := func(names ...string) string {
		return w.Start(t, append(append(flags, "-e", weakenVariable+"="+strings.Join(names, ",")), hostile, "/attack", "sleep")...)
	}
	exec := func(id, user string, names ...string) harness.Result {
		return w.Command(append([]string{"exec", "-u", user, "-e", weakenVariable + "=" + strings.Join(names, ","), id, "/attack"}, checksOf(user, w.Isolation)...)...).Run()
	}
	var agents []string
	want := map[string][]string{}
	for _, s := range confinementSteps {
		if s.by == byProcess || s.vm == vmNone {
			continue
		}
		agents = append(agents, s.name)
		fires := s.fires
		if s.vm != vmSame {
			fires = s.vm
		}
		user := "root"
		if s.user != "" {
			user = s.user
		}
		want[user] = append(want[user], strings.Fields(fires)...)
	}
	id := start(agents...)
	for user, fires := range want {
		wantFired(t, fmt.Sprintf("as %s, without %q", user, agents), exec(id, user, agents...), fires...)
	}
	id = start()
	for _, s := range confinementSteps {
		if s.by != byProcess || s.vm == vmNone {
			continue
		}
		user := "root"
		if s.user != "" {
			user = s.user
		}
		wantFired(t, "without "+s.name, exec(id, user, s.name), strings.Fields(s.fires)...)
	}
}

// Protections whose controls are elsewhere, and steps that protect from nothing, with where and why.
var elsewhere = map[string]string{
	"be undumpable":                             "TestNegativeControls, alone where the agent is not sealed; in a guest too",
	"seal the agent":                            "TestNegativeControls, alone to who may trace; that it suffices there: TestAttacks",
	"hold the right to trace":                   "no protection: without it, what undumpable does in a guest is to be seen",
	"removal of strays":                         "test/e2e/crash",
	"record of an exit before its sandbox goes": "test/e2e/crash",
	"take signals":                              "TestNegativeControls",
	"room for the agent":                        "TestForkBombControl",
	"bound answers":                             "TestRogueAgent",
	"match answers with calls":                  "TestRogueAgent",
	"tell how processes end":                    "TestRogueAgent, where it is no protection but an attack",
	"copy by descriptor":                        "TestCopyOfWhatIsSwappedControl",
	"resolve copies inside the root":            "TestCopyOfWhatIsSwappedControl",
	"stay below the destination":                "TestSwapTestsFindWhatIsMissing",
	"stay below the source":                     "TestSwapTestsFindWhatIsMissing",
	"check directories":                         "TestLinkedDirectories",
	"resolve inside the root":                   "TestNegativeControls",
	"check the working directory":               "TestNegativeControls",
	"check that proc is proc":                   "TestNegativeControls",
	"set capabilities":                          "execve gives root what the bounding set has, others nothing: it clears what an agent might hand on beside. TestConfinementIsTheSame",
	"ask for the AppArmor profile":              "TestHost, where there is AppArmor",
	"reseed":                                    "the tests of clones (pkg/runtime/microvm)",
	"youth":                                     "the same; no protection, but what hides that one is missing",
	"write /etc files":                          "names of hosts and users",
	"make the working directory":                "convenience",
	"mount file systems":                        "each of them is a step above",
	"have all other descriptors closed":         "close inherited descriptors, which also leaves one open",
	"keep descriptors":                          "without them no process starts",
	"set kernel parameters":                     "TestRuntimetestPasses; they grant, and protect from nothing",
	"set the host name":                         "convenience",
	"bring up loopback":                         "convenience",
	"go to the agent's own proc":                "TestMountedProc (pkg/agent)",
	"take the terminal":                         "TestTerminal; who runs as another user than root could not open its streams",
	"take the streams":                          "without them there is no output",
}

// Every step of the code's tables, and everything that a test build can leave out, has a control.
func TestEveryStepHasAControl(t *testing.T) {
	known := maps.Clone(elsewhere)
	for _, s := range confinementSteps {
		known[s.name] = "TestConfinementMatrix"
	}
	found := 0
	for _, dir := range []string{"pkg", "cmd"} {
		harness.Must(t, filepath.WalkDir(filepath.Join(harness.Root, dir), func(path string, e os.DirEntry, err error) error {
			if err != nil || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.Contains(path, "pkg/weaken/") {
				return err
			}
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
			if err != nil {
				return err
			}
			for _, name := range protectionsIn(f) {
				found++
				if known[name] == "" {
					t.Errorf("%s: %q has no control: add it to confinementSteps", path, name)
				}
			}
			return nil
		}))
	}
	if least := len(confinementSteps); found < least {
		t.Errorf("only %d protections were found in the code", found)
	}
}

// protectionsIn are the names of steps in the tables build and confinement, and of what weaken is asked for.
func protectionsIn(f *ast.File) []string {
	var names []string
	add := func(e ast.Expr) {
		if lit, ok := e.(*ast.BasicLit); ok && lit.Kind == token.STRING {
			if s, err := strconv.Unquote(lit.Value); err == nil {
				names = append(names, s)
			}
		}
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.ValueSpec:
			if len(n.Names) == 1 && len(n.Values) == 1 && (n.Names[0].Name == "build" || n.Names[0].Name == "confinement") {
				if table, ok := n.Values[0].(*ast.CompositeLit); ok {
					for _, row := range table.Elts {
						if row, ok := row.(*ast.CompositeLit); ok && len(row.Elts) > 0 {
							add(row.Elts[0])
						}
					}
				}
			}
		case *ast.CallExpr:
			if call, ok := n.Fun.(*ast.SelectorExpr); ok && strings.HasPrefix(call.Sel.Name, "Without") && len(n.Args) > 0 {
				if pkg, ok := call.X.(*ast.Ident); ok && pkg.Name == "weaken" {
					add(n.Args[len(n.Args)-1])
				}
			}
		}
		return true
	})
	return names
}
