// Package imports holds the house's rules of who may know whom, each with its reason. DESIGN: imports go one way.
package imports

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/sandboxd/sandboxd"

// forbidden: no package that matches from may depend, however indirectly, on one that matches to. Paths are relative to
// the module where they begin with a dot; "..." at the end matches everything below, and the path itself. The rule says
// nothing of packages in except, at either end.
var forbidden = []struct {
	from, to string
	except   string
	reason   string
}{
	{"./...", "./pkg/runtime/container", "./cmd/sandboxd ./pkg/runtime/container/...", "only main and tests know which walls there are; everything else goes through the seam"},
	{"./...", "./pkg/runtime/microvm", "./cmd/sandboxd ./pkg/runtime/microvm/...", "only main and tests know which walls there are; everything else goes through the seam"},
	{"./...", "./pkg/runtime/runtimetest", "", "the fake must not run in anyone's production"},
	{"./...", "./test/...", "./test/...", "tests are not a library"},
	{"./...", "testing", "./test/... ./pkg/runtime/runtimetest", "test code does not belong into a program"},
	{"./...", "./cmd/...", "./cmd/...", "a program is not a library"},
	{"./api/...", "./pkg/...", "", "the API is what others build on: it carries nothing of ours"},
	{"./pkg/spec", "./pkg/...", "", "plain values shared by all import none of them"},
	{"./pkg/spec", "./api/...", "", "values inside do not follow the wire format outside"},
	{"./pkg/policy", "./pkg/...", "./pkg/spec", "Decide is a pure function: it reads its arguments and nothing else"},
	{"./pkg/access", "./pkg/...", "./pkg/spec", "what a role allows is a pure function of the file and the request"},
	{"./pkg/runtime", "./pkg/...", "./pkg/spec", "the seam knows neither side"},
	{"./pkg/runtime/...", "./pkg/workload", "./pkg/runtime/runtimetest", "a runtime builds walls; what runs behind them is not its business"},
	{"./pkg/runtime/...", "./pkg/policy", "", "what was decided comes as a value"},
	{"./pkg/runtime/...", "./pkg/image", "", "an image comes as the path of a file"},
	{"./pkg/runtime/...", "./pkg/server", "", "imports go down"},
	{"./pkg/image", "./pkg/workload", "", "imports go down"},
	{"./pkg/workload", "./pkg/server", "", "imports go down: the manager does not know how it is called"},
	{"./pkg/workload", "./api/proto/sandboxd/v1", "", "the manager speaks in our values; the server translates"},
	{"./pkg/workload", "google.golang.org/grpc", "", "the manager does not know how it is called; status codes come in with ttrpc, and stay in pkg/agent"},
	{"./pkg/server", "./pkg/runtime/...", "./pkg/runtime", "the server asks the manager"},
	{"./pkg/agent", "./pkg/agent/guest", "", "the daemon's end and the sandbox's end share the protocol, not code"},
	{"./pkg/agent/guest", "./pkg/agent", "", "the daemon's end and the sandbox's end share the protocol, not code"},
	{"./pkg/client", "./pkg/...", "./pkg/spec", "other services import it: it must bring nothing of the daemon"},
}

// small: programs whose every dependency is on a list, since each byte is paid for in every sandbox, and each line runs
// as PID 1 or beside a guest's memory.
var small = []struct {
	program string
	// Of this module.
	own []string
	// Of others, whole modules.
	modules []string
	// Of the standard library: what must stay out, for it is large.
	without []string
	maxSize int64
	reason  string
}{
	{
		program: "./cmd/sandbox-agent",
		own:     []string{"./cmd/sandbox-agent", "./pkg/agent/guest/...", "./pkg/spec", "./pkg/rawfork", "./pkg/osthread", "./pkg/weaken", "./api/proto/sandboxd/agent/v1"},
		modules: []string{
			"github.com/containerd/ttrpc",               // the protocol
			"github.com/containerd/log",                 // of ttrpc
			"github.com/sirupsen/logrus",                // of containerd/log
			"google.golang.org/protobuf",                // the messages
			"google.golang.org/genproto/googleapis/rpc", // ttrpc's status
			"google.golang.org/grpc",                    // ttrpc's codes and status: packages bound below
			"github.com/opencontainers/runtime-spec",    // what a process and a mount are
			"github.com/moby/sys/user",                  // users and groups from the image's files
			"github.com/xtaci/smux",                     // streams over a clone's one port
			"golang.org/x/sys",                          // system calls
		},
		// regexp, whose tables are made before main, at every start: 0.2 ms of a container's.
		without: []string{"net/http", "crypto/tls", "html/template", "text/template", "go/ast", "go/parser", "database/...", "regexp/..."},
		maxSize: 6 << 20,
		reason:  "PID 1 of every sandbox: its size is paid for in every VM's memory and start",
	},
	{
		program: "./cmd/sandbox-vsock",
		own:     []string{"./cmd/sandbox-vsock", "./pkg/vhostvsock", "./pkg/spec"},
		modules: []string{
			"golang.org/x/sys", // system calls
		},
		without: []string{"net/http", "crypto/tls", "os/exec", "go/ast", "text/template"},
		maxSize: 3 << 20,
		reason:  "one per VM, beside a hostile guest's memory",
	},
	{
		program: "./cmd/sandboxctl",
		own:     []string{"./cmd/sandboxctl/...", "./pkg/client/...", "./pkg/spec", "./pkg/policy", "./pkg/manpage", "./pkg/weaken", "./api/proto/sandboxd/v1"},
		modules: nil, // any
		reason:  "what a user installs on another machine: it brings nothing that builds sandboxes; weaken is empty but in test builds",
	},
}

// pkg is what `go list -json` says of a package.
type pkg struct {
	ImportPath string
	Standard   bool
	Deps       []string
	Module     *struct{ Path string }
}

// load lists every package of the module and what they need. -e: one that does not compile yet is another test's matter.
func load(t *testing.T) map[string]pkg {
	t.Helper()
	cmd := exec.Command("go", "list", "-e", "-deps", "-json=ImportPath,Standard,Deps,Module", module+"/...")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("cannot list packages: %v", err)
	}
	all := map[string]pkg{}
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return all
		} else if err != nil {
			t.Fatalf("cannot read go list: %v", err)
		}
		all[p.ImportPath] = p
	}
}

func matches(pattern, path string) bool {
	if rest, ok := strings.CutPrefix(pattern, "./"); ok {
		pattern = module + "/" + rest
		if rest == "..." {
			return path == module || strings.HasPrefix(path, module+"/")
		}
	}
	if base, ok := strings.CutSuffix(pattern, "/..."); ok {
		return path == base || strings.HasPrefix(path, base+"/")
	}
	return path == pattern
}

func matchesAny(patterns []string, path string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return matches(p, path) })
}

// breaches says who breaks a rule of forbidden.
func breaches(all map[string]pkg, from, to, except string) []string {
	var found []string
	exempt := strings.Fields(except)
	for path, p := range all {
		if !matches(from, path) || matchesAny(exempt, path) {
			continue
		}
		for _, d := range p.Deps {
			if matches(to, d) && !matchesAny(exempt, d) {
				found = append(found, fmt.Sprintf("%s depends on %s", path, d))
			}
		}
	}
	slices.Sort(found)
	return found
}

func TestForbidden(t *testing.T) {
	all := load(t)
	for _, r := range forbidden {
		if !slices.ContainsFunc(keys(all), func(p string) bool { return matches(r.from, p) }) {
			t.Errorf("rule about %s: there is no such package", r.from)
		}
		for _, b := range breaches(all, r.from, r.to, r.except) {
			t.Errorf("%s: %s", b, r.reason)
		}
	}
}

func keys(m map[string]pkg) []string {
	var k []string
	for p := range m {
		k = append(k, p)
	}
	return k
}

// strangers says what a small program links that is not on its lists.
func strangers(all map[string]pkg, program string, own, modules, without []string) []string {
	var found []string
	p, ok := all[module+strings.TrimPrefix(program, ".")]
	if !ok {
		return []string{"there is no " + program}
	}
	for _, d := range p.Deps {
		dep := all[d]
		switch {
		case matches("./...", d):
			if !matchesAny(own, d) {
				found = append(found, d)
			}
		case dep.Standard || dep.Module == nil:
			if matchesAny(without, d) {
				found = append(found, d)
			}
		case modules != nil && !slices.Contains(modules, dep.Module.Path):
			found = append(found, d+" of module "+dep.Module.Path)
		}
	}
	return found
}

func TestSmall(t *testing.T) {
	all := load(t)
	for _, s := range small {
		t.Run(filepath.Base(s.program), func(t *testing.T) {
			for _, f := range strangers(all, s.program, s.own, s.modules, s.without) {
				t.Errorf("links %s: %s", f, s.reason)
			}
			for _, m := range s.modules {
				if !slices.ContainsFunc(all[module+strings.TrimPrefix(s.program, ".")].Deps, func(d string) bool { return all[d].Module != nil && all[d].Module.Path == m }) {
					t.Errorf("does not link %s: take it off the list", m)
				}
			}
			if s.maxSize == 0 {
				return
			}
			info, err := os.Stat("../../bin/" + filepath.Base(s.program))
			if err != nil {
				t.Fatalf("%v: run make build", err)
			}
			if info.Size() > s.maxSize {
				t.Errorf("has %d bytes, more than %d: %s", info.Size(), s.maxSize, s.reason)
			}
		})
	}
}

// Neither check is worth anything if it cannot find what it looks for.
func TestRulesBite(t *testing.T) {
	other := &struct{ Path string }{"example.com/large"}
	all := map[string]pkg{
		module + "/cmd/a":     {ImportPath: module + "/cmd/a", Deps: []string{module + "/pkg/b", module + "/pkg/c/d", "net/http", "example.com/large/x"}},
		module + "/pkg/b":     {ImportPath: module + "/pkg/b", Deps: []string{module + "/pkg/c/d"}},
		module + "/pkg/c/d":   {ImportPath: module + "/pkg/c/d"},
		"net/http":            {ImportPath: "net/http", Standard: true},
		"example.com/large/x": {ImportPath: "example.com/large/x", Module: other},
		"example.com/small":   {ImportPath: "example.com/small"},
	}
	for _, c := range []struct {
		from, to, except string
		want             int
	}{
		{"./...", "./pkg/c/...", "", 2},
		{"./...", "./pkg/c/d", "./cmd/a", 1},
		{"./pkg/b", "./pkg/...", "./pkg/c/d", 0},
		{"./pkg/b", "./pkg/c", "", 0},
		{"./cmd/...", "net/http", "", 1},
	} {
		if got := breaches(all, c.from, c.to, c.except); len(got) != c.want {
			t.Errorf("%s -> %s except %q: found %q, want %d", c.from, c.to, c.except, got, c.want)
		}
	}
	got := strangers(all, "./cmd/a", []string{"./cmd/a", "./pkg/b"}, []string{"example.com/small"}, []string{"net/http"})
	if len(got) != 3 {
		t.Errorf("found %q, want pkg/c/d, net/http and example.com/large/x", got)
	}
	if got := strangers(all, "./cmd/a", []string{"./..."}, []string{"example.com/large"}, nil); len(got) != 0 {
		t.Errorf("found %q, want none", got)
	}
}
