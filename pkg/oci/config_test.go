package oci

import (
	"encoding/json"
	"errors"
	"math"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const testID = "0123456789abcdef0123456789abcdef"

func command(args ...string) spec.Process { return spec.Process{Command: args} }

func mustConfig(t *testing.T, w spec.Workload, img spec.ImageConfig, granted spec.Isolation) *specs.Spec {
	t.Helper()
	c, err := Config(testID, w, img, granted)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestArguments(t *testing.T) {
	img := spec.ImageConfig{Entrypoint: []string{"/entry"}, Command: []string{"a", "b"}}
	for name, c := range map[string]struct {
		p    spec.Process
		img  spec.ImageConfig
		want []string
	}{
		"image's own":                    {spec.Process{}, img, []string{"/entry", "a", "b"}},
		"command over image's":           {command("x"), img, []string{"/entry", "x"}},
		"entrypoint clears command":      {spec.Process{Entrypoint: []string{"/mine", "-v"}}, img, []string{"/mine", "-v"}},
		"entrypoint and command":         {spec.Process{Entrypoint: []string{"/mine"}, Command: []string{"x"}}, img, []string{"/mine", "x"}},
		"empty string clears entrypoint": {spec.Process{Entrypoint: []string{""}, Command: []string{"x", "y"}}, img, []string{"x", "y"}},
		"command alone":                  {command("x", ""), spec.ImageConfig{}, []string{"x", ""}},
		"image's entrypoint alone":       {spec.Process{}, spec.ImageConfig{Entrypoint: []string{"/e"}}, []string{"/e"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := mustConfig(t, spec.Workload{Process: c.p}, c.img, spec.IsolationVM).Process.Args
			if !slices.Equal(got, c.want) {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

// What can never run is refused with the field at fault, before anything is built.
func TestRefused(t *testing.T) {
	tmpfs := func(target string) spec.Workload {
		return spec.Workload{Process: command("x"), Mounts: []spec.Mount{{Type: spec.MountTmpfs, Target: target}}}
	}
	with := func(change func(*spec.Workload)) spec.Workload {
		w := spec.Workload{Process: command("x")}
		change(&w)
		return w
	}
	for name, c := range map[string]struct {
		w     spec.Workload
		img   spec.ImageConfig
		kind  spec.Kind
		field string
		says  string
	}{
		"nothing to run":       {spec.Workload{}, spec.ImageConfig{}, spec.KindInvalid, "spec.process.command", "nothing to run"},
		"entrypoint cleared":   {spec.Workload{Process: spec.Process{Entrypoint: []string{""}}}, spec.ImageConfig{Entrypoint: []string{"/e"}, Command: []string{"c"}}, spec.KindInvalid, "spec.process.command", "nothing to run"},
		"empty word":           {spec.Workload{Process: command("")}, spec.ImageConfig{}, spec.KindInvalid, "spec.process.command", "empty"},
		"NUL in command":       {spec.Workload{Process: command("a\x00b")}, spec.ImageConfig{}, spec.KindInvalid, "spec.process.command", "NUL"},
		"NUL in image's env":   {spec.Workload{Process: command("a")}, spec.ImageConfig{Env: []string{"A=\x00"}}, spec.KindInvalid, "spec.process.env", "NUL"},
		"NUL in image's user":  {spec.Workload{Process: command("a")}, spec.ImageConfig{User: "\x00"}, spec.KindInvalid, "spec.process.user", "NUL"},
		"NUL in image's dir":   {spec.Workload{Process: command("a")}, spec.ImageConfig{WorkingDir: "/\x00"}, spec.KindInvalid, "spec.process.working_dir", "NUL"},
		"bind mount":           {with(func(w *spec.Workload) { w.Mounts = []spec.Mount{{Type: spec.MountBind, Source: "/data", Target: "/d"}} }), spec.ImageConfig{}, spec.KindUnsupported, "spec.mounts[0]", "sandboxctl cp /data ID:/d"},
		"unknown mount":        {with(func(w *spec.Workload) { w.Mounts = []spec.Mount{{Target: "/d"}} }), spec.ImageConfig{}, spec.KindInvalid, "spec.mounts[0].type", "unknown"},
		"tmpfs with source":    {with(func(w *spec.Workload) { w.Mounts = []spec.Mount{{Type: spec.MountTmpfs, Source: "/x", Target: "/d"}} }), spec.ImageConfig{}, spec.KindInvalid, "spec.mounts[0].source", "no source"},
		"mode":                 {with(func(w *spec.Workload) { w.Mounts = []spec.Mount{{Type: spec.MountTmpfs, Target: "/d", Mode: 0o10000}} }), spec.ImageConfig{}, spec.KindInvalid, "spec.mounts[0].mode", "permission bits"},
		"over the root":        {tmpfs("/"), spec.ImageConfig{}, spec.KindInvalid, "spec.mounts[0].target", "root file system"},
		"over the root, dirty": {tmpfs("//."), spec.ImageConfig{}, spec.KindInvalid, "spec.mounts[0].target", "root file system"},
		"over proc":            {tmpfs("/proc"), spec.ImageConfig{}, spec.KindInvalid, "spec.mounts[0].target", "masked"},
		"inside proc":          {tmpfs("//proc/./sys/"), spec.ImageConfig{}, spec.KindInvalid, "spec.mounts[0].target", "masked"},
		"inside sys":           {tmpfs("/sys/firmware"), spec.ImageConfig{}, spec.KindInvalid, "spec.mounts[0].target", "masked"},
		"over dev":             {tmpfs("/dev/"), spec.ImageConfig{}, spec.KindInvalid, "spec.mounts[0].target", "device nodes"},
		"dots":                 {tmpfs("/a/../proc"), spec.ImageConfig{}, spec.KindInvalid, "spec.mounts[0].target", ".."},
		"relative":             {tmpfs("data"), spec.ImageConfig{}, spec.KindInvalid, "spec.mounts[0].target", "absolute"},
		"same target twice": {with(func(w *spec.Workload) {
			w.Mounts = []spec.Mount{{Type: spec.MountTmpfs, Target: "/d"}, {Type: spec.MountTmpfs, Target: "/d/"}}
		}), spec.ImageConfig{}, spec.KindInvalid, "spec.mounts[1].target", "two mounts"},
		"too many mounts": {with(func(w *spec.Workload) { w.Mounts = make([]spec.Mount, maxMounts+1) }), spec.ImageConfig{}, spec.KindInvalid, "spec.mounts", "at most"},
		"memory":          {with(func(w *spec.Workload) { w.Resources.MemoryBytes = minMemory - 1 }), spec.ImageConfig{}, spec.KindInvalid, "spec.resources.memory_bytes", "or more"},
		"disk":            {with(func(w *spec.Workload) { w.Resources.DiskBytes = disk.MaxSize + 1 }), spec.ImageConfig{}, spec.KindInvalid, "spec.resources.disk_bytes", "between"},
		"small disk":      {with(func(w *spec.Workload) { w.Resources.DiskBytes = disk.MinSize - 1 }), spec.ImageConfig{}, spec.KindInvalid, "spec.resources.disk_bytes", "between"},
		"tmpfs size": {with(func(w *spec.Workload) {
			w.Mounts = []spec.Mount{{Type: spec.MountTmpfs, Target: "/d", SizeBytes: math.MaxUint64}}
		}), spec.ImageConfig{}, spec.KindInvalid, "spec.mounts[0].size_bytes", "at most"},
		"stop signal":         {with(func(w *spec.Workload) { w.StopSignal = "SIGFOO" }), spec.ImageConfig{StopSignal: "TERM"}, spec.KindInvalid, "spec.stop_signal", `"SIGFOO" is unknown`},
		"image's stop signal": {with(func(*spec.Workload) {}), spec.ImageConfig{StopSignal: "SIGFOO"}, spec.KindInvalid, "spec.stop_signal", "the image's stop signal"},
		"capability":          {with(func(w *spec.Workload) { w.CapAdd = []string{"CAP_FLY"} }), spec.ImageConfig{}, spec.KindInvalid, "spec.cap_add", "unknown"},
		"dropped too":         {with(func(w *spec.Workload) { w.CapDrop = []string{"FLY"} }), spec.ImageConfig{}, spec.KindInvalid, "spec.cap_drop", "unknown"},
		"rlimit":              {with(func(w *spec.Workload) { w.Process.Rlimits = []spec.Rlimit{{Type: "files"}} }), spec.ImageConfig{}, spec.KindInvalid, "spec.process.rlimits", "unknown"},
		"rlimit upside down": {with(func(w *spec.Workload) { w.Process.Rlimits = []spec.Rlimit{{Type: "core", Soft: 2, Hard: 1}} }),
			spec.ImageConfig{}, spec.KindInvalid, "spec.process.rlimits", "above the hard"},
		"rlimit twice": {with(func(w *spec.Workload) { w.Process.Rlimits = []spec.Rlimit{{Type: "core"}, {Type: "RLIMIT_CORE"}} }),
			spec.ImageConfig{}, spec.KindInvalid, "spec.process.rlimits", "twice"},
	} {
		t.Run(name, func(t *testing.T) {
			for _, granted := range []spec.Isolation{spec.IsolationContainer, spec.IsolationVM} {
				_, err := Config(testID, c.w, c.img, granted)
				var e *spec.Error
				if !errors.As(err, &e) {
					t.Fatalf("%s: %v", granted, err)
				}
				if e.Kind != c.kind || e.Field != c.field || !strings.Contains(e.Error(), c.says) {
					t.Errorf("%s: kind %d field %q: %v; want kind %d field %q with %q", granted, e.Kind, e.Field, e, c.kind, c.field, c.says)
				}
			}
		})
	}
}

// A guest's kernel needs memory, which a container shares.
func TestGuestMemory(t *testing.T) {
	for memory, refused := range map[uint64]bool{0: false, minMemory: true, minGuestMemory - 1: true, minGuestMemory: false} {
		w := spec.Workload{Process: command("x"), Resources: spec.Resources{MemoryBytes: memory}}
		if _, err := Config(testID, w, spec.ImageConfig{}, spec.IsolationContainer); err != nil {
			t.Errorf("a container with %d bytes: %v", memory, err)
		}
		_, err := Config(testID, w, spec.ImageConfig{}, spec.IsolationVM)
		var e *spec.Error
		if refused != (errors.As(err, &e) && e.Kind == spec.KindInvalid && e.Field == "spec.resources.memory_bytes") {
			t.Errorf("a VM with %d bytes: %v", memory, err)
		}
	}
}

// Forgetting to decide must never make a configuration.
func TestUndecidedIsolation(t *testing.T) {
	for _, granted := range []spec.Isolation{"", spec.IsolationAuto, "Container"} {
		if _, err := Config(testID, spec.Workload{Process: command("x")}, spec.ImageConfig{}, granted); err == nil {
			t.Errorf("isolation %q made a configuration", granted)
		}
	}
	if _, err := Config("short", spec.Workload{Process: command("x")}, spec.ImageConfig{}, spec.IsolationVM); err == nil {
		t.Error("a short id made a configuration")
	}
}

func TestEnvironment(t *testing.T) {
	img := spec.ImageConfig{Env: []string{"LANG=C", "broken", "=x", "A=1", "TERM=vt100"}}
	w := spec.Workload{Process: spec.Process{Command: []string{"x"}, Env: []string{"A=2", "B=", "A=3"}, Terminal: true}}
	want := []string{defaultPath, "HOSTNAME=0123456789ab", "TERM=vt100", "LANG=C", "A=3", "B="}
	if got := mustConfig(t, w, img, spec.IsolationVM).Process.Env; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	w.Process = command("x")
	w.Hostname = "web"
	want = []string{"PATH=/bin", "HOSTNAME=web"}
	if got := mustConfig(t, w, spec.ImageConfig{Env: []string{"PATH=/bin"}}, spec.IsolationVM).Process.Env; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
}

func TestProcessDefaults(t *testing.T) {
	p := mustConfig(t, spec.Workload{Process: command("x")}, spec.ImageConfig{}, spec.IsolationVM).Process
	if p.Cwd != "/" || p.User.Username != "0" || p.Terminal || p.ConsoleSize != nil || !p.NoNewPrivileges {
		t.Errorf("defaults: %+v", p)
	}
	img := spec.ImageConfig{User: "www-data", WorkingDir: "srv/../app/"}
	p = mustConfig(t, spec.Workload{Process: command("x")}, img, spec.IsolationVM).Process
	if p.Cwd != "/app" || p.User.Username != "www-data" {
		t.Errorf("image's: %+v", p)
	}
	w := spec.Workload{Process: spec.Process{Command: []string{"x"}, User: "1000:1000", WorkingDir: "/w", Terminal: true,
		TerminalSize: spec.TerminalSize{Rows: 24, Columns: 80}}}
	p = mustConfig(t, w, img, spec.IsolationVM).Process
	if p.Cwd != "/w" || p.User.Username != "1000:1000" || !p.Terminal || *p.ConsoleSize != (specs.Box{Height: 24, Width: 80}) {
		t.Errorf("asked: %+v", p)
	}
}

func TestCapabilities(t *testing.T) {
	defaults := make([]string, 0, len(defaultCapabilities))
	for _, row := range defaultCapabilities {
		defaults = append(defaults, row.name)
	}
	slices.Sort(defaults)
	without := func(set []string, drop ...string) []string {
		return slices.DeleteFunc(slices.Clone(set), func(c string) bool { return slices.Contains(drop, c) })
	}
	all := slices.Sorted(slices.Values(spec.Capabilities))
	for name, c := range map[string]struct{ add, drop, want []string }{
		"default":             {nil, nil, defaults},
		"add":                 {[]string{"net_admin"}, nil, slices.Sorted(slices.Values(append(slices.Clone(defaults), "CAP_NET_ADMIN")))},
		"add one it has":      {[]string{"CHOWN"}, nil, defaults},
		"drop":                {nil, []string{"NET_RAW", "CAP_MKNOD"}, without(defaults, "CAP_NET_RAW", "CAP_MKNOD")},
		"drop all":            {nil, []string{"ALL"}, nil},
		"drop all, add":       {[]string{"CAP_KILL"}, []string{"all"}, []string{"CAP_KILL"}},
		"add all":             {[]string{"ALL"}, nil, all},
		"add all, drop":       {[]string{"ALL"}, []string{"SYS_ADMIN"}, without(all, "CAP_SYS_ADMIN")},
		"added and dropped":   {[]string{"SYS_ADMIN"}, []string{"SYS_ADMIN"}, defaults},
		"add all, drop all":   {[]string{"ALL"}, []string{"ALL"}, all},
		"dropping is by name": {nil, []string{"CAP_SYS_ADMIN"}, defaults},
	} {
		t.Run(name, func(t *testing.T) {
			w := spec.Workload{Process: command("x"), CapAdd: c.add, CapDrop: c.drop}
			got := mustConfig(t, w, spec.ImageConfig{}, spec.IsolationContainer).Process.Capabilities
			for what, set := range map[string][]string{"bounding": got.Bounding, "effective": got.Effective, "permitted": got.Permitted} {
				if !slices.Equal(set, c.want) {
					t.Errorf("%s: %v, want %v", what, set, c.want)
				}
			}
			if len(got.Inheritable)+len(got.Ambient) != 0 {
				t.Errorf("inheritable %v ambient %v", got.Inheritable, got.Ambient)
			}
		})
	}
	if len(defaults) != 14 {
		t.Errorf("%d default capabilities", len(defaults))
	}
	if n := len(spec.Capabilities); n != unix.CAP_LAST_CAP+1 {
		t.Errorf("%d capabilities are known, this build's kernel headers have %d", n, unix.CAP_LAST_CAP+1)
	}
	for name, nr := range map[string]int{"CAP_CHOWN": unix.CAP_CHOWN, "CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN, "CAP_SETFCAP": unix.CAP_SETFCAP, "CAP_BPF": unix.CAP_BPF} {
		if spec.Capabilities[nr] != name {
			t.Errorf("capability %d is %s, not %s", nr, spec.Capabilities[nr], name)
		}
	}
}

func TestRlimits(t *testing.T) {
	restore := hardLimit
	t.Cleanup(func() { hardLimit = restore })
	limits := map[string]uint64{"RLIMIT_NOFILE": 20000, "RLIMIT_CORE": ^uint64(0)}
	hardLimit = func(name string) (uint64, error) { return limits[name], nil }
	ask := func(l ...spec.Rlimit) spec.Workload {
		return spec.Workload{Process: spec.Process{Command: []string{"x"}, Rlimits: l}}
	}
	nofile := func(soft, hard uint64) []specs.POSIXRlimit {
		return []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: soft, Hard: hard}}
	}

	for name, c := range map[string]struct {
		asked     spec.Workload
		own       uint64
		container []specs.POSIXRlimit // nil: refused
		vm        []specs.POSIXRlimit
	}{
		"default":         {ask(), 20000, nofile(1024, 20000), nofile(1024, 524288)},
		"default, plenty": {ask(), ^uint64(0), nofile(1024, 524288), nofile(1024, 524288)},
		"default, little": {ask(), 100, nofile(100, 100), nofile(1024, 524288)},
		"equal":           {ask(spec.Rlimit{Type: "nofile", Soft: 20000, Hard: 20000}), 20000, nofile(20000, 20000), nofile(20000, 20000)},
		"more":            {ask(spec.Rlimit{Type: "nofile", Soft: 1, Hard: 20001}), 20000, nil, nofile(1, 20001)},
	} {
		t.Run(name, func(t *testing.T) {
			limits["RLIMIT_NOFILE"] = c.own
			if got := mustConfig(t, c.asked, spec.ImageConfig{}, spec.IsolationVM).Process.Rlimits; !slices.Equal(got, c.vm) {
				t.Errorf("vm: %v, want %v", got, c.vm)
			}
			got, err := Config(testID, c.asked, spec.ImageConfig{}, spec.IsolationContainer)
			if c.container == nil {
				if spec.KindOf(err) != spec.KindUnsupported || !strings.Contains(err.Error(), "sandboxd's own is 20000") {
					t.Fatalf("container: %v", err)
				}
				return
			}
			if err != nil || !slices.Equal(got.Process.Rlimits, c.container) {
				t.Errorf("container: %v, %v, want %v", got, err, c.container)
			}
		})
	}
	hardLimit = restore
	if _, err := Config(testID, ask(spec.Rlimit{Type: "core"}), spec.ImageConfig{}, spec.IsolationContainer); err != nil {
		t.Errorf("against this process's own limits: %v", err)
	}
}

func TestMounts(t *testing.T) {
	w := spec.Workload{Process: command("x"), Mounts: []spec.Mount{
		{Type: spec.MountTmpfs, Target: "/a/b/c", SizeBytes: 1 << 20, Mode: 0o700, ReadOnly: true},
		{Type: spec.MountTmpfs, Target: "/dev/shm", SizeBytes: 1 << 30},
		{Type: spec.MountTmpfs, Target: "/a/"},
	}}
	c := mustConfig(t, w, spec.ImageConfig{}, spec.IsolationContainer)
	var order []string
	for _, m := range c.Mounts {
		order = append(order, m.Destination)
		if m.Type == "bind" || strings.HasPrefix(m.Source, "/") {
			t.Errorf("%+v shows something of the host", m)
		}
		if !slices.Contains(m.Options, "nosuid") || !slices.Contains(m.Options, "noexec") {
			t.Errorf("%+v lacks nosuid or noexec", m)
		}
	}
	want := []string{"/proc", "/dev", "/dev/pts", "/sys", "/dev/mqueue", "/a", "/dev/shm", "/a/b/c"}
	if !slices.Equal(order, want) {
		t.Errorf("order %v, want %v", order, want)
	}
	if got, want := c.Mounts[7].Options, []string{"nosuid", "noexec", "nodev", "mode=700", "size=1048576", "ro"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got, want := c.Mounts[5].Options, []string{"nosuid", "noexec", "nodev", "mode=1777", "size=67108864"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}

	// A caller may change what he got without changing what the next one gets.
	c.Mounts[0].Options[0] = "suid"
	if again := mustConfig(t, w, spec.ImageConfig{}, spec.IsolationContainer); again.Mounts[0].Options[0] != "nosuid" {
		t.Error("the table of mounts was changed through a result")
	}
}

func TestRows(t *testing.T) {
	for _, row := range systemMounts {
		if row.reason == "" {
			t.Errorf("mount %s has no reason", row.Destination)
		}
	}
	for _, row := range slices.Concat(maskedPaths, readonlyPaths) {
		if row.reason == "" || !strings.HasPrefix(row.path, "/proc/") && !strings.HasPrefix(row.path, "/sys/") {
			t.Errorf("path %+v", row)
		}
	}
	for _, row := range sysctls {
		if row.reason == "" || !strings.HasPrefix(row.name, "net.") {
			t.Errorf("kernel parameter %+v", row)
		}
	}
	for _, row := range defaultCapabilities {
		if row.reason == "" {
			t.Errorf("capability %s has no reason", row.name)
		}
	}
}

// The two walls get the same configuration but for what is said in namespacesOf and rlimitsOf.
func TestBothIsolationsAlike(t *testing.T) {
	w := spec.Workload{Process: command("x"), Resources: spec.Resources{CPUMillis: 1500, MemoryBytes: 1 << 30, Pids: 100},
		ReadOnlyRoot: true, CapAdd: []string{"NET_ADMIN"}}
	container := mustConfig(t, w, spec.ImageConfig{}, spec.IsolationContainer)
	vm := mustConfig(t, w, spec.ImageConfig{}, spec.IsolationVM)
	if len(container.Linux.Namespaces) != 7 || len(vm.Linux.Namespaces) != 0 {
		t.Errorf("namespaces: %v and %v", container.Linux.Namespaces, vm.Linux.Namespaces)
	}
	for _, c := range []*specs.Spec{container, vm} {
		c.Linux.Namespaces, c.Process.Rlimits = nil, nil
		delete(c.Annotations, AnnotationIsolation)
	}
	if !reflect.DeepEqual(container, vm) {
		a, _ := json.Marshal(container)
		b, _ := json.Marshal(vm)
		t.Errorf("they differ:\n%s\n%s", a, b)
	}
	if !container.Root.Readonly || container.Hostname != "0123456789ab" {
		t.Errorf("root %+v hostname %q", container.Root, container.Hostname)
	}
	r := container.Linux.Resources
	if *r.CPU.Quota != 150_000 || *r.CPU.Period != 100_000 || *r.Memory.Limit != 1<<30 || *r.Pids.Limit != 100 {
		t.Errorf("resources %+v", r)
	}
}

func TestExecProcess(t *testing.T) {
	base := mustConfig(t, spec.Workload{Process: spec.Process{Command: []string{"main"}, Env: []string{"A=1"}, User: "app", WorkingDir: "/app"}},
		spec.ImageConfig{}, spec.IsolationContainer).Process
	before, err := json.Marshal(base)
	if err != nil {
		t.Fatal(err)
	}

	p, err := ExecProcess(base, command("sh", "-c", "x"))
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(p.Args, []string{"sh", "-c", "x"}) || p.Cwd != "/app" || p.User.Username != "app" || !slices.Equal(p.Env, base.Env) || p.Terminal {
		t.Errorf("inherited: %+v", p)
	}
	if !p.NoNewPrivileges || !reflect.DeepEqual(p.Capabilities, base.Capabilities) || !reflect.DeepEqual(p.Rlimits, base.Rlimits) {
		t.Errorf("confinement: %+v", p)
	}

	p, err = ExecProcess(base, spec.Process{Command: []string{"sh"}, Env: []string{"A=2", "B=3"}, User: "root", WorkingDir: "tmp", Terminal: true,
		TerminalSize: spec.TerminalSize{Rows: 1, Columns: 2}, Rlimits: []spec.Rlimit{{Type: "nofile", Soft: 10, Hard: 20}}})
	if err != nil {
		t.Fatal(err)
	}
	if p.Cwd != "/tmp" || p.User.Username != "root" || !p.Terminal || p.ConsoleSize.Width != 2 ||
		!slices.Contains(p.Env, "A=2") || slices.Contains(p.Env, "A=1") || !slices.Contains(p.Env, "TERM=xterm") ||
		!slices.Equal(p.Rlimits, []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 10, Hard: 20}}) {
		t.Errorf("asked: %+v", p)
	}

	for name, bad := range map[string]spec.Process{
		"no command":  {},
		"entrypoint":  {Entrypoint: []string{"x"}, Command: []string{"y"}},
		"more files":  {Command: []string{"y"}, Rlimits: []spec.Rlimit{{Type: "nofile", Hard: 1 << 40}}},
		"NUL in user": {Command: []string{"y"}, User: "\x00"},
	} {
		if _, err := ExecProcess(base, bad); spec.KindOf(err) != spec.KindInvalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	if after, _ := json.Marshal(base); string(after) != string(before) {
		t.Errorf("the workload's own process was changed:\n%s\n%s", before, after)
	}
}

func TestParseSignal(t *testing.T) {
	for name, want := range map[string]syscall.Signal{
		"SIGTERM": 15, "TERM": 15, "term": 15, "15": 15, "9": 9, "64": 64, "KILL": 9, "sigwinch": 28, "SIGRTMIN": 34, "RTMIN+3": 37, "SIGRTMAX": 64, "RTMAX-1": 63, "rtmin+30": 64,
	} {
		if got, err := ParseSignal(name); err != nil || got != want {
			t.Errorf("%s: %d, %v, want %d", name, got, err, want)
		}
	}
	for _, name := range []string{"", "0", "65", "-1", "SIG", "SIGFOO", "RTMIN3", "RTMIN-1", "RTMIN+31", "RTMAX+1", "RTMIN+99999999999999999999", "+9", "RTMIN+9223372036854775807", " 9", "9.0"} {
		if got, err := ParseSignal(name); spec.KindOf(err) != spec.KindInvalid || err == nil {
			t.Errorf("%q: %d, %v", name, got, err)
		}
	}
}

// The request's signal goes before the image's, whatever the image says.
func TestStopSignal(t *testing.T) {
	for _, c := range []struct {
		asked, image string
		want         syscall.Signal
	}{
		{"", "", syscall.SIGTERM},
		{"", "SIGQUIT", syscall.SIGQUIT},
		{"INT", "SIGQUIT", syscall.SIGINT},
		{"3", "SIGFOO", syscall.SIGQUIT},
		{"RTMIN+3", "", 37},
	} {
		got, err := StopSignal(spec.Workload{StopSignal: c.asked}, spec.ImageConfig{StopSignal: c.image})
		if err != nil || got != c.want {
			t.Errorf("asked %q, image %q: %d, %v, want %d", c.asked, c.image, got, err, c.want)
		}
	}
}

func TestCanonicalNames(t *testing.T) {
	for in, want := range map[string]string{"net_admin": "CAP_NET_ADMIN", "CAP_NET_ADMIN": "CAP_NET_ADMIN", "all": "ALL", "CAP_ALL": "ALL"} {
		if got, err := CanonicalCap(in); err != nil || got != want {
			t.Errorf("%s: %s, %v", in, got, err)
		}
	}
	for in, want := range map[string]string{"nofile": "RLIMIT_NOFILE", "RLIMIT_CORE": "RLIMIT_CORE"} {
		if got, err := CanonicalRlimit(in); err != nil || got != want {
			t.Errorf("%s: %s, %v", in, got, err)
		}
	}
	if _, err := CanonicalCap(""); err == nil {
		t.Error("an empty capability")
	}
	if _, err := CanonicalRlimit(""); err == nil {
		t.Error("an empty resource limit")
	}
}
