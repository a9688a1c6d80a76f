package policy

import (
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"unicode/utf8"
)

func mustLoad(t testing.TB, source string) *Policy {
	t.Helper()
	p, err := Load([]byte(source), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestLoad(t *testing.T) {
	p := mustLoad(t, `
version: 1
default: deny
rules:
  - name: trusted
    when: has(request.labels.trust) && request.labels.trust == "high"
    isolation: container
    reason: >
      Our own code,
      reviewed.
  - {name: "no root helpers", when: '"CAP_SYS_ADMIN" in request.capAdd', deny: true}
  - name: rest
    when: true
    isolation: vm
    seccomp: any
`)
	want := []Rule{
		{"trusted", `has(request.labels.trust) && request.labels.trust == "high"`, "container", "Our own code, reviewed.", ""},
		{"no root helpers", `"CAP_SYS_ADMIN" in request.capAdd`, "deny", "", ""},
		{"rest", "true", "vm", "", "any"},
	}
	if got := p.Rules(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("rules %q, want %q", got, want)
	}
	if p.Default() != "deny" {
		t.Errorf("default %q", p.Default())
	}
	if !strings.HasPrefix(string(p.Source()), "\nversion") || len(p.Digest()) != len("sha256:")+64 {
		t.Errorf("source %q digest %q", p.Source(), p.Digest())
	}
	if p := mustLoad(t, "version: 1"); p.Default() != "vm" || len(p.Rules()) != 0 {
		t.Errorf("the shortest policy: %q %v", p.Default(), p.Rules())
	}
}

// Each mistake is an error that says where it is, counted as an editor counts.
func TestLoadMistakes(t *testing.T) {
	rule := func(lines ...string) string {
		return "version: 1\nrules:\n  - name: a\n    " + strings.Join(lines, "\n    ") + "\n"
	}
	answered := func(lines ...string) string { return rule(append(lines, "isolation: vm")...) }
	for name, c := range map[string]struct {
		source string
		want   []string // one a line of the error
	}{
		"empty":             {"", []string{`p: the file is empty; a policy starts with "version: 1"`}},
		"only a comment":    {"# nothing\n", []string{`p: the file is empty`}},
		"not YAML":          {"version: 1\nrules: [\n", []string{"p:2: not YAML: "}},
		"tabs":              {"version: 1\nrules:\n\t- name: a\n", []string{"p:3: not YAML: "}},
		"not UTF-8":         {"version: 1 # \xff\n", []string{"p: the file is not UTF-8"}},
		"a list":            {"- version: 1\n", []string{"p:1:1: the policy must be a mapping with the fields version, default, rules"}},
		"two documents":     {"version: 1\n---\nversion: 1\n", []string{"p:2:1: a second document"}},
		"broken second":     {"version: 1\n---\n[", []string{"not YAML"}},
		"no version":        {"default: vm\n", []string{`p:1:1: field "version" is missing`}},
		"version 2":         {"version: 2\n", []string{`p:1:10: version "2" is unknown; this sandboxd understands "version: 1"`}},
		"version as text":   {"version: \"1\"\n", []string{`p:1:10: version "1" is unknown`}},
		"version 1.0":       {"version: 1.0\n", []string{`p:1:10: version "1.0" is unknown`}},
		"unknown field":     {"version: 1\nrule: []\n", []string{`p:2:1: unknown field "rule" in the policy; it has version, default, rules`}},
		"field twice":       {"version: 1\ndefault: vm\ndefault: container\n", []string{`p:3:1: field "default" is given twice in the policy`}},
		"default":           {"version: 1\ndefault: Container\n", []string{`p:2:10: default must be one of vm, container, deny, not "Container"`}},
		"default empty":     {"version: 1\ndefault:\n", []string{`default must be one of`}},
		"rules no list":     {"version: 1\nrules: {}\n", []string{`p:2:8: rules must be a list`}},
		"rule no mapping":   {"version: 1\nrules:\n  - vm\n", []string{"p:3:5: rule 1 must be a mapping"}},
		"unknown rule key":  {answered("when: true", "if: true"), []string{`p:5:5: unknown field "if" in rule 1; it has name, when, isolation, deny, seccomp, reason`}},
		"merge key":         {answered("when: true", "<<: {reason: x}"), []string{`p:5:5: unknown field "<<"`}},
		"alias":             {"version: 1\ndefault: &a vm\nrules: *a\n", []string{"p:3:8: field \"rules\": aliases are not understood"}},
		"no name":           {"version: 1\nrules:\n  - when: true\n    isolation: vm\n", []string{"p:3:5: rule 1 has no name"}},
		"empty name":        {"version: 1\nrules:\n  - name: ''\n    when: true\n    isolation: vm\n", []string{"p:3:11: name must be a text"}},
		"name of nothing":   {"version: 1\nrules:\n  - name: default\n    when: true\n    isolation: vm\n", []string{`p:3:11: a rule cannot be called "default"`}},
		"name of no policy": {"version: 1\nrules:\n  - name: no-policy\n    when: true\n    isolation: vm\n", []string{`p:3:11: a rule cannot be called "no-policy"`}},
		"name twice": {answered("when: true") + "  - name: a\n    when: true\n    deny: true\n",
			[]string{`p:6:5: rule "a" has the name of the rule in line 3`}},
		"control character": {answered("when: true", `reason: "a\eb"`), []string{"p:5:13: reason must be one line without control characters"}},
		"two lines":         {answered("when: true", "reason: |", "  a", "  b"), []string{"p:5:13: reason must be one line"}},
		"long reason":       {answered("when: true", "reason: "+strings.Repeat("x", 1001)), []string{"p:5:13: reason has more than 1000"}},
		"no condition":      {rule("isolation: vm"), []string{`p:3:5: rule 1 has no condition: give "when"`}},
		"empty condition":   {answered("when:"), []string{"p:4:10: when must be a condition"}},
		"blank condition":   {answered(`when: " "`), []string{"p:4:11: when must be a condition"}},
		"a list condition":  {answered("when: [true]"), []string{"p:4:11: when must be a condition"}},
		"no answer":         {rule("when: true"), []string{"p:3:5: rule 1 has no answer"}},
		"both answers":      {answered("when: true", "deny: true"), []string{"p:5:11: rule 1 has both isolation and deny"}},
		"deny false":        {rule("when: true", "deny: false"), []string{"p:5:11: deny must be true"}},
		"deny as text":      {rule("when: true", `deny: "true"`), []string{"p:5:11: deny must be true"}},
		"isolation auto":    {rule("when: true", "isolation: auto"), []string{`p:5:16: isolation must be one of container, vm, not "auto"`}},
		"seccomp":           {answered("when: true", "seccomp: unconfined"), []string{`seccomp must be one of default, any, not "unconfined"`}},
		"seccomp of a deny": {rule("when: true", "deny: true", "seccomp: any"), []string{"rule 1 denies, and so grants no seccomp profile"}},
		"isolation deny":    {rule("when: true", "isolation: deny"), []string{`isolation must be one of container, vm, not "deny"`}},
		"all at once": {"version: 3\nfoo: 1\nrules:\n  - name: a\n    when: nope\n", []string{
			"p:1:10: version", "p:2:1: unknown field", "p:4:5: rule 1 has no answer", "p:5:11: when: undeclared reference to 'nope'"}},

		// The expression's own mistakes.
		"unknown variable":     {answered(`when: request.image == "x" && requst.image == "y"`), []string{`p:4:35: when: undeclared reference to 'requst'`}},
		"unknown field of one": {answered(`when: request.imagee == "x"`), []string{"p:4:18: when: undefined field 'imagee'"}},
		"wrong type":           {answered(`when: request.resources.pids > "x"`), []string{"p:4:34: when: found no matching overload for '_>_'"}},
		"not a condition":      {answered(`when: request.image`), []string{"p:4:11: when: the condition must be true or false, and it is of type string"}},
		"dynamic":              {answered(`when: dyn(true)`), []string{"p:4:11: when: the condition must be true or false, and it is of type dyn"}},
		"syntax":               {answered(`when: request.image ==`), []string{"p:4:26: when: Syntax error"}},
		"bad regular expr":     {answered(`when: request.image.matches("(")`), []string{"p:4:33: when: invalid matches argument"}},
		"single-quoted":        {answered(`when: 'request.image == ''it'' && nope'`), []string{"p:4:39: when: undeclared reference to 'nope'"}},
		"double-quoted":        {answered(`when: "request.image == \"it\" \n && nope"`), []string{"p:4:42: when: undeclared reference to 'nope'"}},
		"hexadecimal escapes":  {answered(`when: "request.image == '\x41\u00e4\x20' && nope"`), []string{"p:4:49: when: undeclared reference to 'nope'"}},
		"over two plain lines": {answered(`when: request.image == "ä"`, `  && nope`), []string{"p:5:10: when: undeclared reference to 'nope'"}},
		"over a folded block":  {answered("when: >-", "  request.image == 'x' &&", "", "    nope"), []string{"p:7:9: when: undeclared reference to 'nope'"}},
		"over a literal block": {answered("when: |2 # text", "   request.image == 'x'", "    && nope"), []string{"p:6:12: when: undeclared reference to 'nope'"}},
		"two in one":           {answered("when: |", "  nope ||", "  neither"), []string{"p:5:7: when: undeclared reference to 'nope'", "p:6:7: when: undeclared reference to 'neither'"}},
		"CRLF":                 {strings.ReplaceAll(answered("when: |", "  true &&", "  nope"), "\n", "\r\n"), []string{"p:6:7: when: undeclared"}},
		"too long":             {answered("when: " + strings.Repeat("true && ", 2000) + "true"), []string{"p:4:11: when: expression code point size exceeds limit"}},
		"too deep":             {answered("when: " + strings.Repeat("(", 200) + "true" + strings.Repeat(")", 200)), []string{"when: "}},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := Load([]byte(c.source), "p")
			if err == nil || p != nil {
				t.Fatalf("loaded: %v", p.Rules())
			}
			lines := strings.Split(err.Error(), "\n")
			if len(lines) != len(c.want) {
				t.Fatalf("%d mistakes, want %d:\n%v", len(lines), len(c.want), err)
			}
			for i, want := range c.want {
				if !strings.Contains(lines[i], want) || strings.HasPrefix(want, "p:") && !strings.HasPrefix(lines[i], want) {
					t.Errorf("says %q, want %q", lines[i], want)
				}
			}
		})
	}
}

func TestLoadLimits(t *testing.T) {
	many := "version: 1\nrules:\n"
	for i := range maxRules + 1 {
		many += fmt.Sprintf("  - {name: r%d, when: true, isolation: vm}\n", i)
	}
	for _, source := range []string{many, "version: 1\n# " + strings.Repeat("x", maxSourceBytes)} {
		if _, err := Load([]byte(source), "p"); err == nil {
			t.Errorf("%d bytes were loaded", len(source))
		}
	}
}

// The example that is installed, and that docs/policy.md explains.
func TestExample(t *testing.T) {
	file := filepath.Join("..", "..", "deploy", "policy", "example.yaml")
	source, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Load(source, file)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range p.Rules() {
		if r.Reason == "" {
			t.Errorf("rule %q gives no reason", r.Name)
		}
	}
}

// The policies in the manual load, and its names are those of the language.
func TestManual(t *testing.T) {
	file := filepath.Join("..", "..", "docs", "policy.md")
	source, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	blocks := strings.Split(string(source), "```yaml\n")[1:]
	if len(blocks) < 3 {
		t.Errorf("%s has %d policies", file, len(blocks))
	}
	for i, block := range blocks {
		policy, _, _ := strings.Cut(block, "```")
		if _, err := Load([]byte(policy), fmt.Sprintf("policy %d of %s", i+1, file)); err != nil {
			t.Error(err)
		}
	}
	for _, facts := range []reflect.Type{reflect.TypeFor[requestFacts](), reflect.TypeFor[mountFacts](), reflect.TypeFor[resourceFacts](),
		reflect.TypeFor[imageFacts](), reflect.TypeFor[imageConfigFacts](), reflect.TypeFor[callerFacts](), reflect.TypeFor[hostFacts]()} {
		for field := range facts.Fields() {
			name := field.Tag.Get("cel")
			if !strings.Contains(string(source), "`"+name) && !strings.Contains(string(source), "."+name+"`") {
				t.Errorf("%s does not speak of %s", file, name)
			}
		}
	}
}

func FuzzLoad(f *testing.F) {
	f.Add([]byte("version: 1\ndefault: vm\nrules:\n  - name: a\n    when: >-\n      request.image == 'x' &&\n      nope\n    isolation: vm\n"))
	f.Add([]byte("version: 1\nrules: [{name: a, when: \"request.image == \\\"\\x41\\\" && \\\n nope\", deny: true}]"))
	f.Add([]byte("version: 1\nrules:\n- {name: a, when: 'request.labels[''x''] == 1', isolation: container, reason: x}"))
	f.Add([]byte("a: &a [*a]"))
	f.Add([]byte("version: 1\nrules:\n  - name: a\n    when: |2-\n\n\n"))
	f.Fuzz(func(t *testing.T, source []byte) {
		p, err := Load(source, "f")
		if (p == nil) == (err == nil) {
			t.Fatalf("%v and %v", p, err)
		}
		if err != nil {
			if !utf8.ValidString(err.Error()) {
				t.Fatalf("%q", err)
			}
			lines := lineBreak.Split(string(source), -1)
			for _, m := range err.(Errors) {
				if m.Line > len(lines)+1 || m.Line < 0 || m.Column < 0 {
					t.Fatalf("%v is in no line of %d", m, len(lines))
				}
			}
			return
		}
		// What loads decides, or refuses, and does it twice alike.
		checkDecision(t, p, Input{Host: everything, Request: Request{Image: "x", Workload: workload("auto")}})
	})
}
