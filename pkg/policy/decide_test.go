package policy

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// everything is a host that can give both.
var everything = Host{Hostname: "h", ContainerAvailable: true, VMAvailable: true, VMAccelerator: "kvm"}

func workload(asked spec.Isolation) spec.Workload { return spec.Workload{Isolation: asked} }

func ask(asked spec.Isolation, labels map[string]string) Input {
	return Input{Host: everything, Request: Request{Image: "debian:12", Labels: labels, Workload: workload(asked)}}
}

const three = `
version: 1
default: %s
rules:
  - name: trusted
    when: has(request.labels.trust) && request.labels.trust == "high"
    isolation: container
    reason: our own code
  - name: strangers
    when: has(request.labels.trust) && request.labels.trust == "none"
    isolation: vm
    reason: nobody has read this code.
  - name: never
    when: has(request.labels.trust) && request.labels.trust == "hostile"
    deny: true
    reason: known to be hostile
`

func TestDecide(t *testing.T) {
	trust := func(v string) map[string]string { return map[string]string{"trust": v} }
	noVM := Host{ContainerAvailable: true, VMReason: "QEMU is not installed."}
	noContainer := Host{VMAvailable: true, ContainerReason: "no user namespaces"}
	for name, c := range map[string]struct {
		policy  string // the default, or "" for none at all
		labels  map[string]string
		asked   spec.Isolation
		host    Host
		granted spec.Isolation
		weakest spec.Isolation
		rule    string
		kind    spec.Kind // of the error, if not granted
		says    string    // in reason or error
	}{
		"auto gets exactly it":               {"deny", trust("high"), "auto", everything, "container", "container", "trusted", 0, "our own code"},
		"auto gets exactly vm":               {"deny", trust("none"), "auto", everything, "vm", "vm", "strangers", 0, "nobody has read"},
		"as much as the rule":                {"deny", trust("none"), "vm", everything, "vm", "vm", "strangers", 0, "nobody has read"},
		"more is granted":                    {"deny", trust("high"), "vm", everything, "vm", "container", "trusted", 0, "our own code"},
		"less is denied":                     {"deny", trust("none"), "container", everything, "", "vm", "strangers", spec.KindDenied, `the policy's rule "strangers" demands vm isolation, and container was asked for: nobody has read this code; ask for vm or auto`},
		"denied whatever is asked":           {"vm", trust("hostile"), "vm", everything, "", "", "never", spec.KindDenied, `the policy's rule "never" refuses this workload: known to be hostile`},
		"default deny":                       {"deny", nil, "vm", everything, "", "", "default", spec.KindDenied, "the policy's default refuses this workload: no rule matches"},
		"default vm":                         {"vm", nil, "auto", everything, "vm", "vm", "default", 0, "no rule matches, and the policy's default is vm"},
		"default vm, less asked":             {"vm", nil, "container", everything, "", "vm", "default", spec.KindDenied, "the policy's default demands vm isolation"},
		"default container":                  {"container", nil, "auto", everything, "container", "container", "default", 0, "default is container"},
		"default container, more asked":      {"container", nil, "vm", everything, "vm", "container", "default", 0, "default is container"},
		"no policy, auto":                    {"", nil, "auto", everything, "vm", "vm", "no-policy", 0, "auto then means vm"},
		"no policy, container":               {"", nil, "container", everything, "container", "container", "no-policy", 0, "asks for container"},
		"no policy, vm":                      {"", nil, "vm", everything, "vm", "vm", "no-policy", 0, "asks for vm"},
		"no vm here":                         {"vm", nil, "auto", noVM, "", "vm", "default", spec.KindWrongState, "this host cannot run a workload with vm isolation: QEMU is not installed; see `sandboxctl doctor`"},
		"no vm here, no policy":              {"", nil, "auto", noVM, "", "vm", "no-policy", spec.KindWrongState, "QEMU is not installed"},
		"no vm here, more asked":             {"container", nil, "vm", noVM, "", "container", "default", spec.KindWrongState, "the policy would allow container"},
		"no container here":                  {"container", nil, "auto", noContainer, "", "container", "default", spec.KindWrongState, "no user namespaces; ask for vm, which the policy allows too"},
		"no container here, vm asked":        {"container", nil, "vm", noContainer, "vm", "container", "default", 0, ""},
		"nothing here":                       {"container", nil, "auto", Host{}, "", "container", "default", spec.KindWrongState, "cannot run a workload with container isolation; see `sandboxctl doctor`"},
		"nothing here, denied comes first":   {"deny", nil, "auto", Host{}, "", "", "default", spec.KindDenied, "refuses"},
		"less asked, no vm: denied, not had": {"vm", nil, "container", noVM, "", "vm", "default", spec.KindDenied, "demands vm"},
	} {
		t.Run(name, func(t *testing.T) {
			p := None()
			if c.policy != "" {
				p = mustLoad(t, fmt.Sprintf(three, c.policy))
			}
			in := ask(c.asked, c.labels)
			in.Host = c.host
			d, err := p.Decide(in)
			if d.Granted != c.granted || d.Allowed != (c.granted != "") || d.Isolation != c.weakest || d.Rule != c.rule || d.PolicyDigest != p.Digest() {
				t.Errorf("decision %+v", d)
			}
			if c.granted != "" {
				if err != nil || !strings.Contains(d.Reason, c.says) {
					t.Errorf("reason %q, error %v", d.Reason, err)
				}
				return
			}
			var e *spec.Error
			if !errors.As(err, &e) || e.Kind != c.kind || !strings.Contains(e.Error(), c.says) {
				t.Fatalf("error %v, want %q", err, c.says)
			}
			if c.kind == spec.KindDenied && (e.Rule != c.rule || e.Reason != spec.ReasonPolicyDenied || d.Reason != e.Error()) {
				t.Errorf("error %+v decision %+v", e, d)
			}
			if c.kind == spec.KindWrongState && (e.Reason != spec.ReasonUnsatisfiable || d.Unsatisfiable != e.Error()) {
				t.Errorf("error %+v decision %+v", e, d)
			}
		})
	}
}

// Forgetting something refuses.
func TestZeroValues(t *testing.T) {
	for name, c := range map[string]struct {
		policy *Policy
		in     Input
	}{
		"nothing asked":     {None(), Input{Host: everything}},
		"unknown isolation": {None(), ask("Container", nil)},
		"policy not loaded": {&Policy{}, ask("vm", nil)},
		"no host":           {None(), Input{Request: Request{Workload: workload("container")}}},
		"nothing at all":    {&Policy{}, Input{}},
	} {
		d, err := c.policy.Decide(c.in)
		if err == nil || d.Allowed || d.Granted != "" {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
	}
	if (&Policy{}).Default() != "deny" {
		t.Error("a policy that was not loaded has a default")
	}
}

func TestTrace(t *testing.T) {
	p := mustLoad(t, fmt.Sprintf(three, "vm"))
	d, err := p.Decide(ask("auto", map[string]string{"trust": "none"}))
	if err != nil {
		t.Fatal(err)
	}
	rules := p.Rules()
	want := []Trace{{"trusted", rules[0].When, false}, {"strangers", rules[1].When, true}}
	if !reflect.DeepEqual(d.Trace, want) {
		t.Errorf("%+v, want %+v", d.Trace, want)
	}
	if d, _ = p.Decide(ask("auto", nil)); len(d.Trace) != 3 || d.Trace[2].Matched {
		t.Errorf("%+v", d.Trace)
	}
}

// A condition that fails refuses the request: to skip the rule could mean to skip the one that denies.
func TestConditionThatFails(t *testing.T) {
	for name, c := range map[string]struct{ when, says string }{
		"missing label":   {`request.labels.trust == "high"`, "no such key: trust"},
		"missing element": {`request.command[0] == "sh"`, "index out of bounds"},
		"division":        {`1 / request.resources.pids == 1`, "division by zero"},
		"costs too much":  {`request.command.all(a, request.command.all(b, a == b))`, "operation cancelled: actual cost limit exceeded"},
	} {
		t.Run(name, func(t *testing.T) {
			p := mustLoad(t, "version: 1\ndefault: container\nrules:\n  - name: odd\n    when: >-\n      "+c.when+"\n    deny: true\n")
			in := ask("auto", nil)
			if name == "costs too much" {
				in.Request.Workload.Process.Command = make([]string, 4096)
			}
			begin := time.Now()
			d, err := p.Decide(in)
			if took := time.Since(begin); took > 20*time.Second {
				t.Errorf("it took %v", took)
			}
			var e *spec.Error
			if !errors.As(err, &e) || e.Kind != spec.KindDenied || e.Rule != "odd" || !strings.Contains(e.Error(), "cannot be evaluated for this request: "+c.says) {
				t.Fatalf("%v", err)
			}
			if d.Allowed || d.Isolation != "" || d.Rule != "odd" || len(d.Trace) != 1 {
				t.Errorf("%+v", d)
			}
		})
	}
	// The other way round, the request is in order: a guard, or an optional value.
	for _, when := range []string{
		`has(request.labels.trust) && request.labels.trust == "none"`,
		`"trust" in request.labels && request.labels["trust"] == "none"`,
		`request.labels[?"trust"].orValue("") == "none"`,
	} {
		p := mustLoad(t, "version: 1\ndefault: container\nrules:\n  - name: odd\n    when: >-\n      "+when+"\n    deny: true\n")
		if d, err := p.Decide(ask("auto", nil)); err != nil || !d.Allowed {
			t.Errorf("%s: %v", when, err)
		}
		if d, err := p.Decide(ask("auto", map[string]string{"trust": "none"})); err == nil || d.Allowed {
			t.Errorf("%s: %+v", when, d)
		}
	}
}

// Every variable, with the value a condition finds in it.
func TestFacts(t *testing.T) {
	full := Input{
		Host:   Host{Hostname: "box", ContainerAvailable: true, VMAvailable: true, VMAccelerator: "tcg"},
		Caller: spec.Caller{UID: 4294967295, GID: 100, GIDs: []uint32{100, 27}, PID: 77},
		Image: Image{Digest: "sha256:aa", Names: []string{"docker.io/library/debian:12"}, Config: spec.ImageConfig{
			User: "app", Entrypoint: []string{"/e"}, Command: []string{"c"}, Env: []string{"A=b"}, WorkingDir: "/w", Labels: map[string]string{"org": "us"}}},
		Request: Request{Image: "debian:12", Name: "web", Labels: map[string]string{"team": "blue"}, Workload: spec.Workload{
			Isolation: "auto", Hostname: "hh", Network: "", ReadOnlyRoot: true, CapAdd: []string{"net_admin"}, CapDrop: []string{"CAP_KILL"},
			Process:   spec.Process{Entrypoint: []string{"/x"}, Command: []string{"sh", "-c"}, Env: []string{"TOKEN=secret"}, User: "root", WorkingDir: "/t", Terminal: true},
			Resources: spec.Resources{CPUMillis: 1500, MemoryBytes: 1 << 63, Pids: 10, DiskBytes: 5},
			Mounts: []spec.Mount{{Type: spec.MountBind, Source: "/srv/../etc//", Target: "/data/./x", ReadOnly: true},
				{Type: spec.MountTmpfs, Target: "/tmp"}},
		}},
	}
	for _, when := range []string{
		`request.image == "debian:12" && request.name == "web" && request.labels == {"team": "blue"} && request.isolation == "auto"`,
		`request.entrypoint == ["/x"] && request.command == ["sh", "-c"] && request.envNames == ["TOKEN"] && request.user == "root"`,
		`request.workingDir == "/t" && request.hostname == "hh" && request.terminal && request.readOnlyRoot`,
		`request.capAdd == ["CAP_NET_ADMIN"] && request.capDrop == ["CAP_KILL"]`,
		`request.network == "none"`,
		`request.seccomp == "default" && request.seccompDigest == ""`,
		`request.mounts.size() == 2 && request.mounts[0].type == "bind" && request.mounts[0].readOnly && request.mounts[0].target == "/data/x"`,
		`request.mounts.exists(m, m.type == "bind" && (m.source == "/etc" || m.source.startsWith("/etc/")))`,
		`request.mounts[1].source == "" && !request.mounts[1].readOnly`,
		`request.resources.cpuMillis == 1500 && request.resources.pids == 10 && request.resources.diskBytes == 5`,
		`request.resources.memoryBytes > 1024 * 1024 * 1024`,
		`image.digest == "sha256:aa" && image.names.exists(n, n.startsWith("docker.io/library/"))`,
		`image.config.user == "app" && image.config.entrypoint == ["/e"] && image.config.command == ["c"] && image.config.env == ["A=b"]`,
		`image.config.workingDir == "/w" && image.config.labels.org == "us"`,
		`caller.uid == 4294967295 && caller.gid == 100 && 27 in caller.gids && caller.pid == 77`,
		`host.hostname == "box" && host.containerAvailable && host.vmAvailable && host.vmAccelerator == "tcg"`,
		`sets.intersects(request.capAdd, ["CAP_SYS_ADMIN", "CAP_NET_ADMIN"])`,
		`request.image.lowerAscii().split(":")[1] == "12"`,
		`image.digest.matches("^sha256:a+$")`,
	} {
		p := mustLoad(t, "version: 1\ndefault: deny\nrules:\n  - name: r\n    when: >-\n      "+when+"\n    isolation: vm\n")
		if d, err := p.Decide(full); err != nil || d.Rule != "r" {
			t.Errorf("%s: %v", when, err)
		}
	}
	// Nothing set: every variable is there, and empty.
	for _, when := range []string{
		`request.labels.size() + request.command.size() + request.mounts.size() + request.capAdd.size() + image.names.size() + caller.gids.size() == 0`,
		`!has(request.labels.x) && !has(image.config.labels.x) && !("x" in request.envNames)`,
		`request.network == "none" && request.user == "" && image.digest == "" && host.vmAccelerator == ""`,
	} {
		p := mustLoad(t, "version: 1\ndefault: deny\nrules:\n  - name: r\n    when: >-\n      "+when+"\n    isolation: vm\n")
		in := Input{Host: Host{VMAvailable: true}, Request: Request{Workload: workload("auto")}}
		if d, err := p.Decide(in); err != nil || d.Rule != "r" {
			t.Errorf("%s: %v", when, err)
		}
	}
}

// A rule about one capability also sees a request for all of them, in whatever spelling.
func TestAllCapabilitiesAreSeen(t *testing.T) {
	p := mustLoad(t, "version: 1\ndefault: container\nrules:\n  - name: r\n    when: '\"CAP_SYS_ADMIN\" in request.capAdd'\n    isolation: vm\n")
	for _, c := range []string{"ALL", "all", "CAP_ALL", "SYS_ADMIN", "cap_sys_admin"} {
		in := ask("auto", nil)
		in.Request.Workload.CapAdd = []string{c}
		if d, err := p.Decide(in); err != nil || d.Granted != spec.IsolationVM {
			t.Errorf("%s: %+v, %v", c, d, err)
		}
	}
	in := ask("auto", nil)
	in.Request.Workload.CapAdd = []string{"SYS_ADMIM"}
	if d, err := p.Decide(in); spec.KindOf(err) != spec.KindInvalid || d.Allowed {
		t.Errorf("an unknown capability: %+v, %v", d, err)
	}
}

// checkDecision holds for every policy and every input: what is granted is never weaker than what was answered, nor than
// what was asked for, nor what the host lacks; a refusal grants nothing; and the same question has the same answer.
func checkDecision(t *testing.T, p *Policy, in Input) {
	t.Helper()
	d, err := p.Decide(in)
	again, errAgain := p.Decide(in)
	if !reflect.DeepEqual(d, again) || fmt.Sprint(err) != fmt.Sprint(errAgain) {
		t.Fatalf("two answers: %+v, %v and %+v, %v", d, err, again, errAgain)
	}
	if d.Allowed != (err == nil) || d.Allowed != (d.Granted != "") {
		t.Fatalf("%+v with error %v", d, err)
	}
	if !d.Allowed {
		if spec.KindOf(err) == spec.KindInternal {
			t.Fatalf("a refusal without a kind: %v", err)
		}
		return
	}
	asked := in.Request.Workload.Isolation
	switch {
	case d.Granted != spec.IsolationContainer && d.Granted != spec.IsolationVM,
		d.Isolation != spec.IsolationContainer && d.Isolation != spec.IsolationVM,
		d.Granted.Weaker(d.Isolation), d.Granted.Weaker(asked),
		asked == spec.IsolationAuto && d.Granted != d.Isolation,
		asked != spec.IsolationAuto && d.Granted != asked,
		d.Granted == spec.IsolationContainer && !in.Host.ContainerAvailable,
		d.Granted == spec.IsolationVM && !in.Host.VMAvailable,
		d.Rule == "", d.Reason == "":
		t.Fatalf("asked for %q on %+v: %+v", asked, in.Host, d)
	}
}

// Random policies over three labels against random requests, beside a reading of the rules by hand.
func TestNeverWeaker(t *testing.T) {
	answers := []string{"isolation: container", "isolation: vm", "deny: true"}
	words := []string{"container", "vm", "deny"}
	values := []string{"a", "b", ""}
	for seed := range uint64(150) {
		r := rand.New(rand.NewPCG(seed, 1))
		type row struct{ key, value, answer string }
		var rows []row
		fallback := words[r.IntN(3)]
		source := "version: 1\ndefault: " + fallback + "\nrules:\n"
		for i := range r.IntN(6) {
			a := r.IntN(3)
			x := row{values[r.IntN(2)], values[r.IntN(2)], words[a]}
			rows = append(rows, x)
			source += fmt.Sprintf("  - {name: r%d, when: 'request.labels[?\"%s\"].orValue(\"\") == \"%s\"', %s}\n", i, x.key, x.value, answers[a])
		}
		if len(rows) == 0 {
			source = "version: 1\ndefault: " + fallback + "\n"
		}
		p := mustLoad(t, source)
		for range 40 {
			labels := map[string]string{}
			for _, key := range values[:2] {
				if v := values[r.IntN(3)]; v != "" {
					labels[key] = v
				}
			}
			in := ask([]spec.Isolation{"auto", "container", "vm", ""}[r.IntN(4)], labels)
			in.Host.ContainerAvailable, in.Host.VMAvailable = r.IntN(4) > 0, r.IntN(4) > 0
			checkDecision(t, p, in)

			want := fallback
			for _, x := range rows {
				if labels[x.key] == x.value {
					want = x.answer
					break
				}
			}
			d, err := p.Decide(in)
			if in.Request.Workload.Isolation == "" {
				continue
			}
			if want == "deny" && (d.Allowed || d.Isolation != "" || spec.ReasonOf(err) != spec.ReasonPolicyDenied) ||
				want != "deny" && string(d.Isolation) != want {
				t.Fatalf("seed %d, labels %v: %+v, %v; by hand %s\n%s", seed, labels, d, err, want, source)
			}
		}
	}
}

func BenchmarkDecide(b *testing.B) {
	p := mustLoad(b, fmt.Sprintf(three, "vm"))
	in := ask("auto", map[string]string{"trust": "low"})
	for b.Loop() {
		if _, err := p.Decide(in); err != nil {
			b.Fatal(err)
		}
	}
}
