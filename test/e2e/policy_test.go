package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

const testPolicy = `version: 1
default: deny
rules:
  - name: no-raw-sockets
    when: '"NET_ADMIN" in request.capAdd || "CAP_NET_ADMIN" in request.capAdd'
    deny: true
    reason: nobody configures networks here
  - name: own-code
    when: '"origin" in request.labels && request.labels["origin"] == "ours"'
    isolation: container
    reason: we wrote it
  - name: strangers-code
    when: '"origin" in request.labels && request.labels["origin"] == "stranger"'
    isolation: vm
    reason: we did not write it
`

func policyFile(t *testing.T, source string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "policy.yaml")
	must(t, os.WriteFile(file, []byte(source), 0o600))
	return file
}

func TestPolicyDecides(t *testing.T) {
	file := policyFile(t, testPolicy)
	d := ownDaemon(t, "--policy", file)
	d.Watch(t)

	for _, c := range []struct {
		what         string
		flags        []string
		isolation    string
		rule, reason string
	}{
		{"a rule says container", []string{"--label", "origin=ours"}, "ISOLATION_CONTAINER", "own-code", "we wrote it"},
		{"a rule says vm", []string{"--label", "origin=stranger"}, "ISOLATION_VM", "strangers-code", "we did not write it"},
		{"what suffices may be demanded", []string{"--label", "origin=ours", "--isolation", "container"}, "ISOLATION_CONTAINER", "own-code", "we wrote it"},
		{"more may be demanded", []string{"--label", "origin=ours", "--isolation", "vm"}, "ISOLATION_VM", "own-code", "we wrote it"},
	} {
		w := d.Wall("auto")
		id := w.Create(t, append(c.flags, busybox, "true")...)
		got := d.Inspect(t, id).Status
		if got.Isolation != c.isolation || got.Decision.Rule != c.rule || !strings.Contains(got.Decision.Reason, c.reason) {
			t.Errorf("%s: got %+v, want %s by rule %s", c.what, got, c.isolation, c.rule)
		}
		d.Call(t, "start", id)
		d.Call(t, "wait", id).WantOut(t, "0\n")
	}

	for _, c := range []struct {
		what  string
		flags []string
		words []string
	}{
		{"less than the rule says", []string{"--label", "origin=stranger", "--isolation", "container"}, []string{"strangers-code"}},
		{"denied by a rule", []string{"--label", "origin=ours", "--cap-add", "NET_ADMIN"}, []string{"no-raw-sockets", "nobody configures networks here"}},
		{"no rule matches", nil, []string{"default"}},
	} {
		r := d.Command(append(append([]string{"run"}, c.flags...), busybox, "true")...).Run()
		t.Log(c.what, r.Stderr)
		r.WantError(t, 125, c.words...)
	}
	d.Call(t, "ps", "-a", "-q") // what was refused left no record, but for the four of above
	if n := strings.Count(d.Call(t, "ps", "-a", "-q").Stdout, "\n"); n != 4 {
		t.Errorf("%d workloads are recorded, want 4", n)
	}
}

func TestPolicyIsExplained(t *testing.T) {
	file := policyFile(t, testPolicy)
	d := ownDaemon(t, "--policy", file)
	d.Watch(t)
	out := d.Call(t, "policy", "explain", "--label", "origin=stranger", busybox).Stdout
	for _, word := range []string{"vm", "strangers-code", "we did not write it", "own-code"} {
		if !strings.Contains(out, word) {
			t.Errorf("policy explain does not say %q:\n%s", word, out)
		}
	}
	// A denial is an answer, and says who denies.
	r := d.Command("policy", "explain", "--cap-add", "NET_ADMIN", busybox).Run()
	if !strings.Contains(r.Stdout, "no-raw-sockets") {
		t.Errorf("policy explain of what is denied: exit code %d\n%s%s", r.Code, r.Stdout, r.Stderr)
	}
	if out := d.Call(t, "policy", "show").Stdout; !strings.Contains(out, "strangers-code") {
		t.Errorf("policy show wrote %q", out)
	}
	if out := d.Call(t, "ps", "-a", "-q").Stdout; out != "" {
		t.Errorf("explaining made workloads: %s", out)
	}
}

func TestPolicyCheck(t *testing.T) {
	d := shared
	d.Watch(t)
	d.Call(t, "policy", "check", policyFile(t, testPolicy))
	for what, c := range map[string]struct{ from, to, says string }{
		"unknown field":      {"reason: we wrote it", "reasn: we wrote it", "reasn"},
		"no such isolation":  {"isolation: vm", "isolation: jail", "jail"},
		"condition of type":  {`request.labels["origin"] == "ours"'`, `request.labels["origin"]'`, ".yaml:9:"},
		"unknown name":       {"request.capAdd ||", "request.capsAdd ||", "capsAdd"},
		"version":            {"version: 1", "version: 9", "version"},
		"rule decides twice": {"deny: true", "deny: true\n    isolation: vm", "both isolation and deny"},
	} {
		broken := strings.Replace(testPolicy, c.from, c.to, 1)
		if broken == testPolicy {
			t.Fatalf("%s: nothing to replace", what)
		}
		r := d.Command("policy", "check", policyFile(t, broken)).Run()
		if r.Code == 0 || !strings.Contains(r.Stderr+r.Stdout, c.says) {
			t.Errorf("%s: exit code %d, want an error that says %q; got %s%s", what, r.Code, c.says, r.Stdout, r.Stderr)
		}
		// The daemon must not run on a policy that is not what its author meant.
		bad, err := harness.NewDaemon("bad-policy", "--policy", policyFile(t, broken))
		must(t, err)
		if err := bad.Start(); err == nil {
			t.Errorf("%s: the daemon started", what)
		}
		must(t, bad.Remove())
	}
}

// Without a policy file callers choose, and auto means vm.
func TestWithoutPolicy(t *testing.T) {
	d := shared
	d.Watch(t)
	for _, c := range []struct{ asked, want string }{
		{"container", "ISOLATION_CONTAINER"}, {"vm", "ISOLATION_VM"}, {"auto", "ISOLATION_VM"},
	} {
		id := d.Wall(c.asked).Create(t, busybox, "true")
		got := d.Inspect(t, id).Status
		if got.Isolation != c.want || got.Decision.Rule != "no-policy" {
			t.Errorf("--isolation %s: %+v", c.asked, got)
		}
	}
	d.Command("create", "--isolation", "jail", busybox).Run().WantError(t, 125, "jail")
}
