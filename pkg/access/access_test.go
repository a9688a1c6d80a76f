package access

import (
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

const example = `version: 1
roles:
  - name: operator
    everything: true
  - name: ci
    may: [view, logs, create, control, delete, exec]
    workloads: {tenant: a, labels: {team: shop}}
    isolation: [auto, vm]
    images: ["docker.io/library/*", "registry.example/a/**"]
    binds:
      - {path: /srv/a}
      - {path: /srv/a/out/, writable: true}
    capabilities: [net_bind_service]
    networks: [front]
    max: {memory: 1g, pids: 100}
  - name: own
    may: [view]
    workloads: {own: true}
grants:
  - {users: [root], roles: [operator]}
  - {users: ["1000"], groups: ["2000"], roles: [ci, own]}
  - {certificates: ["uri:spiffe://example/ci"], roles: [ci]}
`

func mustLoad(t *testing.T, source string) *Table {
	t.Helper()
	table, err := Load([]byte(source), "access.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return table
}

func TestRolesOf(t *testing.T) {
	table := mustLoad(t, example)
	for _, c := range []struct {
		caller spec.Caller
		want   string
	}{
		{spec.Caller{}, "operator"},
		{spec.Caller{UID: 1000, GID: 1000}, "ci own"},
		{spec.Caller{UID: 1, GID: 2000}, "ci own"},
		{spec.Caller{UID: 1, GID: 1, GIDs: []uint32{5, 2000}}, "ci own"},
		{spec.Caller{UID: 1, GID: 1}, ""},
		{spec.Caller{UID: spec.NoID, GID: spec.NoID, Names: []string{"cn:x", "uri:spiffe://example/ci"}}, "ci"},
		{spec.Caller{UID: spec.NoID, GID: spec.NoID, Names: []string{"uri:spiffe://example/ci/other"}}, ""},
		// A certificate is no user, whatever the ids beside it say.
		{spec.Caller{Names: []string{"cn:root"}}, ""},
	} {
		var got []string
		for _, r := range table.RolesOf(c.caller) {
			got = append(got, r.Name)
		}
		if strings.Join(got, " ") != c.want {
			t.Errorf("%+v has roles %q, want %q", c.caller, got, c.want)
		}
	}
	if roles := Everybody().RolesOf(spec.Caller{UID: 77}); len(roles) != 1 || !roles[0].Everything {
		t.Errorf("without a file: %v", roles)
	}
}

func TestRoleAnswers(t *testing.T) {
	table := mustLoad(t, example)
	ci := table.roles[1]
	for what, c := range map[string]struct {
		why   string
		allow bool
	}{
		"image":                 {ci.Uses("docker.io/library/debian:12"), true},
		"one of its names":      {ci.Uses("x", "registry.example/a/b/c:1"), true},
		"deeper than *":         {ci.Uses("docker.io/library/a/b"), false},
		"other image":           {ci.Uses("registry.example/ab"), false},
		"vm":                    {ci.Isolates(spec.IsolationVM), true},
		"container":             {ci.Isolates(spec.IsolationContainer), false},
		"bind":                  {ci.Mounts("/srv/a/x", true), true},
		"bind itself":           {ci.Mounts("/srv/a", true), true},
		"bind to write":         {ci.Mounts("/srv/a/x", false), false},
		"bind to write, listed": {ci.Mounts("/srv/a/out/x", false), true},
		"bind beside":           {ci.Mounts("/srv/ab", true), false},
		"bind out":              {ci.Mounts("/srv/a/../../etc", true), false},
		"bind all":              {ci.Mounts("/", true), false},
		"capability":            {ci.Capable("CAP_NET_BIND_SERVICE"), true},
		"capability, short":     {ci.Capable("NET_BIND_SERVICE"), true},
		"other capability":      {ci.Capable("SYS_ADMIN"), false},
		"all capabilities":      {ci.Capable("ALL"), false},
		"no network":            {ci.Connects("none"), true},
		"network":               {ci.Connects("front"), true},
		"other network":         {ci.Connects("host"), false},
		"privilege":             {ci.Has(Seccomp), false},
		"memory":                {ci.Within("memory", 1<<30, uint64(ci.Max.Memory), 512<<20), true},
		"more memory":           {ci.Within("memory", 1<<30+1, uint64(ci.Max.Memory), 512<<20), false},
		"default over the max":  {ci.Within("pids", 0, uint64(ci.Max.Pids), 512), false},
		"max left out":          {ci.Within("disk", 2<<30, uint64(ci.Max.Disk), 2<<30), true},
		"over the default":      {ci.Within("disk", 2<<30+1, uint64(ci.Max.Disk), 2<<30), false},
		"labels":                {ci.Fits(map[string]string{"tenant": "a", "team": "shop", "x": "y"}), true},
		"other tenant":          {ci.Fits(map[string]string{"tenant": "b", "team": "shop"}), false},
		"no tenant":             {ci.Fits(nil), false},
		"everything":            {Everyone.Capable("ALL") + Everyone.Has(Placement) + Everyone.Mounts("/", false) + Everyone.Uses("x"), true},
		"nothing":               {(&Role{}).Uses("x"), false},
	} {
		if (c.why == "") != c.allow {
			t.Errorf("%s: %q, want allowed %t", what, c.why, c.allow)
		}
	}
	if (&Role{}).Allows(View) || (&Role{May: []Verb{""}}).Allows("") || !ci.Allows(Exec) || ci.Allows(ImagesAdd) {
		t.Error("verbs are not what the file says")
	}
}

func TestOwn(t *testing.T) {
	own := mustLoad(t, example).roles[2]
	me, other := spec.Caller{UID: 1000, PID: 1}, spec.Caller{UID: 1001}
	if !own.Selects(nil, spec.Caller{UID: 1000, PID: 99}, me) || own.Selects(nil, other, me) {
		t.Error("own does not mean what the caller's user created")
	}
	cert := spec.Caller{UID: spec.NoID, GID: spec.NoID, Names: []string{"cn:a"}}
	if own.Selects(nil, spec.Caller{UID: spec.NoID, GID: spec.NoID, Names: []string{"cn:b"}}, cert) {
		t.Error("two certificates are the same caller")
	}
}

func TestLoadIsStrict(t *testing.T) {
	for what, c := range map[string][2]string{
		"empty":             {"", "empty"},
		"no version":        {"roles: []\n", "version"},
		"unknown key":       {"version: 1\nrolls: []\n", "rolls"},
		"unknown role key":  {"version: 1\nroles:\n  - {name: a, mays: [view]}\n", "mays"},
		"key given twice":   {"version: 1\nversion: 1\n", "already defined"},
		"unknown verb":      {"version: 1\nroles: [{name: a, may: [fly]}]\n", "fly"},
		"empty verb":        {"version: 1\nroles: [{name: a, may: [\"\"]}]\n", "unknown"},
		"unknown privilege": {"version: 1\nroles: [{name: a, privileges: [root]}]\n", "root"},
		// What nothing would enforce, or no request can ask for.
		"quota":             {"version: 1\nroles: [{name: a, quota: {workloads: 1}}]\n", "quota"},
		"other max":         {"version: 1\nroles: [{name: a, max: {swap: 1}}]\n", "swap"},
		"no such demand":    {"version: 1\nroles: [{name: a, privileges: [devices]}]\n", "devices"},
		"unknown isolation": {"version: 1\nroles: [{name: a, isolation: [none]}]\n", "none"},
		"unknown cap":       {"version: 1\nroles: [{name: a, capabilities: [FLY]}]\n", "FLY"},
		"relative bind":     {"version: 1\nroles: [{name: a, binds: [{path: srv}]}]\n", "srv"},
		"bad pattern":       {"version: 1\nroles: [{name: a, images: [\"[\"]}]\n", "pattern"},
		"two roles":         {"version: 1\nroles: [{name: a}, {name: a}]\n", "two roles"},
		"no name":           {"version: 1\nroles: [{may: [view]}]\n", "no name"},
		"null role":         {"version: 1\nroles: [null]\n", "no name"},
		"all and some":      {"version: 1\nroles: [{name: a, everything: true, may: [view]}]\n", "everything"},
		"bad size":          {"version: 1\nroles: [{name: a, max: {memory: lots}}]\n", "lots"},
		"size overflows":    {"version: 1\nroles: [{name: a, max: {memory: 99999999t}}]\n", "99999999t"},
		"negative":          {"version: 1\nroles: [{name: a, max: {pids: -1}}]\n", "-1"},
		"grant to nobody":   {"version: 1\nroles: [{name: a}]\ngrants: [{roles: [a]}]\n", "at least one"},
		"grant of nothing":  {"version: 1\nroles: [{name: a}]\ngrants: [{users: [\"1\"]}]\n", "a role"},
		"grant of unknown":  {"version: 1\ngrants: [{users: [\"1\"], roles: [b]}]\n", "no role"},
		"unknown user":      {"version: 1\nroles: [{name: a}]\ngrants: [{users: [no-such-user-here], roles: [a]}]\n", "no-such-user-here"},
		"nobody's id":       {"version: 1\nroles: [{name: a}]\ngrants: [{users: [\"4294967295\"], roles: [a]}]\n", "nobody"},
		"bare certificate":  {"version: 1\nroles: [{name: a}]\ngrants: [{certificates: [ci], roles: [a]}]\n", "cn:"},
		"second document":   {"version: 1\n---\nversion: 1\n", "second"},
	} {
		if _, err := Load([]byte(c[0]), "f"); err == nil || !strings.Contains(err.Error(), c[1]) {
			t.Errorf("%s: %v, want an error about %q", what, err, c[1])
		}
	}
}
