package workload

import (
	"testing"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Nobody shares a template with another caller or tenant, whatever they call themselves, unless all share all.
func TestWhoSharesTemplates(t *testing.T) {
	tenant := func(value string) map[string]string { return map[string]string{spec.TenantLabel: value, "other": "x"} }
	apart := []struct {
		caller spec.Caller
		labels map[string]string
	}{
		{spec.Caller{UID: 0}, nil},
		{spec.Caller{UID: 1}, nil},
		{spec.Caller{UID: 0}, tenant("a")},
		{spec.Caller{UID: 0}, tenant("b")},
		{spec.Caller{UID: 1}, tenant("a")},
		{spec.Caller{UID: 0}, tenant("")},
		{spec.Caller{UID: 0}, tenant(`a" tenant="b`)},
		{spec.Caller{UID: spec.NoID, Names: []string{"cn:uid:0"}}, nil},
		{spec.Caller{UID: spec.NoID, Names: []string{`cn:x"] tenant="a`}}, nil},
		{spec.Caller{UID: spec.NoID, Names: []string{"cn:x"}}, tenant("a")},
	}
	seen := map[string]int{}
	own := TemplateSharing{Label: spec.TenantLabel}
	for n, c := range apart {
		scope := own.scope(c.caller, c.labels)
		if scope == "" {
			t.Errorf("%+v with %v shares with everybody", c.caller, c.labels)
		}
		if other, known := seen[scope]; known {
			t.Errorf("%+v and %+v share %s", c, apart[other], scope)
		}
		seen[scope] = n
		if got := (TemplateSharing{All: true, Label: spec.TenantLabel}).scope(c.caller, c.labels); got != "" {
			t.Errorf("where all share all, %+v has %q", c.caller, got)
		}
	}
	a := own.scope(spec.Caller{UID: 1, PID: 2}, tenant("a"))
	if b := own.scope(spec.Caller{UID: 1, PID: 3}, map[string]string{spec.TenantLabel: "a"}); a != b {
		t.Errorf("one tenant's have %q and %q", a, b)
	}
}
