package policy

import (
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Another filter than the default one is granted by the rule that matches, or not at all.
func TestSeccompIsGrantedByTheRuleOnly(t *testing.T) {
	p := mustLoad(t, `
version: 1
default: container
rules:
  - name: digest
    when: request.seccompDigest == "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    isolation: container
    seccomp: any
  - name: debuggers
    when: has(request.labels.debug) && request.seccomp == "unconfined"
    isolation: container
    seccomp: any
  - name: plain
    when: has(request.labels.plain)
    isolation: container
    seccomp: default
`)
	none, custom := spec.Seccomp{Unconfined: true}, spec.Seccomp{Profile: `{"defaultAction":"SCMP_ACT_ALLOW"}`}
	for name, c := range map[string]struct {
		policy  *Policy
		label   string
		seccomp spec.Seccomp
		rule    string
		allowed bool
	}{
		"default, no rule":           {p, "", spec.Seccomp{}, "default", true},
		"unconfined, no rule":        {p, "", none, "default", false},
		"custom, no rule":            {p, "", custom, "default", false},
		"unconfined, granted":        {p, "debug", none, "debuggers", true},
		"custom, not what is meant":  {p, "debug", custom, "default", false},
		"unconfined, rule is silent": {p, "plain", none, "plain", false},
		"custom of a known digest":   {p, "", spec.Seccomp{Profile: "{}"}, "digest", true},
		"both at once":               {p, "", spec.Seccomp{Profile: "{}", Unconfined: true}, "digest", true}, // pkg/oci refuses it
		"no policy":                  {None(), "", none, "no-policy", false},
		"no policy, default":         {None(), "", spec.Seccomp{}, "no-policy", true},
	} {
		in := ask("container", map[string]string{c.label: ""})
		in.Request.Workload.Seccomp = c.seccomp
		d, err := c.policy.Decide(in)
		if d.Allowed != c.allowed || d.Rule != c.rule || (err == nil) != c.allowed {
			t.Errorf("%s: %+v, %v", name, d, err)
		}
		if err != nil && (spec.KindOf(err) != spec.KindDenied || !strings.Contains(err.Error(), "seccomp: any")) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
