// Package documented looks in the sources for what an operator may meet, and in docs/operations.md for what to do then.
package documented

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

const (
	root       = "../.."
	operations = root + "/docs/operations.md"
)

// files parses the sources, but for tests, of the directories below root.
func files(t *testing.T, dirs ...string) (out []*ast.File) {
	t.Helper()
	for _, dir := range dirs {
		err := filepath.WalkDir(filepath.Join(root, dir), func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") || strings.Contains(path, "runtimetest") {
				return err
			}
			f, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
			out = append(out, f)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func literal(e ast.Expr) string {
	l, ok := e.(*ast.BasicLit)
	if !ok || l.Kind != token.STRING {
		return ""
	}
	s, _ := strconv.Unquote(l.Value)
	return s
}

var upper = regexp.MustCompile(`^[A-Z]+(_[A-Z]+)*$`)

// reasons are the string constants named …Reason…, the table of kinds, and what withInfo is given.
func reasons(t *testing.T) map[string]bool {
	found := map[string]bool{}
	add := func(e ast.Expr) {
		if s := literal(e); upper.MatchString(s) {
			found[s] = true
		}
	}
	for _, f := range files(t, "pkg/server", "pkg/workload", "pkg/spec", "pkg/access", "pkg/policy", "pkg/client", "pkg/image", "pkg/network") {
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.ValueSpec:
				for i, name := range n.Names {
					if i < len(n.Values) && strings.Contains(strings.ToLower(name.Name), "reason") {
						add(n.Values[i])
					}
					if name.Name == "kinds" && len(n.Values) == 1 {
						ast.Inspect(n.Values[0], func(n ast.Node) bool {
							if e, ok := n.(ast.Expr); ok {
								add(e)
							}
							return true
						})
					}
				}
			case *ast.CallExpr:
				switch fn := n.Fun.(type) {
				case *ast.Ident:
					if fn.Name == "withInfo" {
						for _, a := range n.Args {
							add(a)
						}
					}
				case *ast.SelectorExpr:
					if fn.Sel.Name == "WithReason" && len(n.Args) == 1 {
						add(n.Args[0])
					}
				}
			}
			return true
		})
	}
	return found
}

// checks are the names of Doctor's checks: of Check literals, of the helpers that make them, and of a container's steps.
func checks(t *testing.T) map[string]bool {
	found := map[string]bool{}
	add := func(e ast.Expr) {
		if b, ok := e.(*ast.BinaryExpr); ok { // name + ": cleanup", string(i) + " isolation"
			e = b.Y
		}
		if s := strings.TrimLeft(literal(e), ": "); s != "" {
			found[s] = true
		}
	}
	for _, f := range files(t, "pkg/server", "pkg/network", "pkg/runtime") {
		ast.Inspect(f, func(n ast.Node) bool {
			switch n := n.(type) {
			case *ast.CompositeLit:
				fields := map[string]ast.Expr{}
				for _, e := range n.Elts {
					if kv, ok := e.(*ast.KeyValueExpr); ok {
						if k, ok := kv.Key.(*ast.Ident); ok {
							fields[k.Name] = kv.Value
						}
					}
				}
				if fields["Name"] != nil && fields["Result"] != nil {
					add(fields["Name"])
				}
				if fields["name"] != nil && fields["run"] != nil {
					add(fields["name"])
				}
			case *ast.CallExpr:
				if fn, ok := n.Fun.(*ast.Ident); ok && len(n.Args) > 1 {
					switch fn.Name {
					case "ok", "failed", "checkDir", "checkSpace":
						add(n.Args[0])
					}
				}
			case *ast.FuncDecl:
				if !strings.HasPrefix(n.Name.Name, "check") && n.Name.Name != "Checks" {
					return true
				}
				ast.Inspect(n, func(m ast.Node) bool { // const name = "socket"
					if v, ok := m.(*ast.ValueSpec); ok && len(v.Names) == 1 && v.Names[0].Name == "name" && len(v.Values) == 1 {
						add(v.Values[0])
					}
					return true
				})
			}
			return true
		})
	}
	return found
}

// missing are the names without a row in a section: a row's first cell names what it is about in backquotes.
func missing(text, heading string, names map[string]bool) (out []string) {
	_, section, _ := strings.Cut(text, "\n## "+heading+"\n")
	section, _, _ = strings.Cut(section, "\n## ")
	rows := map[string]bool{}
	for line := range strings.Lines(section) {
		cells := strings.Split(line, "|")
		if len(cells) < 4 || len(strings.TrimSpace(cells[2])) < 10 {
			continue
		}
		for _, m := range regexp.MustCompile("`([^`]+)`").FindAllStringSubmatch(cells[1], -1) {
			rows[m[1]] = true
		}
	}
	for name := range names {
		if !rows[name] {
			out = append(out, name)
		}
	}
	return out
}

func TestEveryCheckAndErrorSaysWhatToDo(t *testing.T) {
	b, err := os.ReadFile(operations)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		heading string
		names   map[string]bool
		// That these are among them shows that the sources are really read.
		known []string
	}{
		{"Errors", reasons(t), []string{"INTERNAL", "FORBIDDEN", "ADMISSION_DISK", "CANCELED", "UNREACHABLE", "POLICY_DENIED"}},
		{"Doctor's findings", checks(t), []string{"version", "disk space", "state directory", "socket", "networks", "kvm", "fork", "cleanup", "isolation"}},
	} {
		for _, k := range c.known {
			if !c.names[k] {
				t.Errorf("%s: %q was not found in the sources: does this test still read them?", c.heading, k)
			}
		}
		for _, name := range missing(string(b), c.heading, c.names) {
			t.Errorf("docs/operations.md says under %q nothing of %q", c.heading, name)
		}
		// A row that is gone is missed.
		without := strings.ReplaceAll(string(b), "`"+c.known[0]+"`", "")
		if got := missing(without, c.heading, c.names); len(got) != 1 || got[0] != c.known[0] {
			t.Errorf("without the row of %s the test misses %q", c.known[0], got)
		}
	}
}
