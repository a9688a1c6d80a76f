package crash

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// faultVariable is pkg/fault's: this build of the test does not have it.
const faultVariable = "SANDBOXD_FAULT"

// point is where a test build of the daemon can be stopped, and behind which wall it comes there.
type point struct{ place, step, wall string }

func (p point) String() string { return p.place + ": " + p.step }

// programs are a test build: with points, and with protections that can be left out. Made once.
var programs = sync.OnceValues(func() (string, error) {
	bin := filepath.Join(harness.Cache, "crash-bin") + "/"
	cmd := exec.Command("go", "build", "-trimpath", "-tags", "sandboxd_fault sandboxd_weaken", "-o", bin, "./cmd/sandboxd", "./cmd/sandbox-agent", "./cmd/sandbox-vsock")
	cmd.Dir, cmd.Env = harness.Root, append(os.Environ(), "CGO_ENABLED=0")
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := harness.StartChild(cmd); err != nil {
		return "", err
	}
	if err := harness.WaitChild(cmd); err != nil {
		return "", &buildError{err, said.String()}
	}
	return bin, nil
})

type buildError struct {
	err  error
	said string
}

func (e *buildError) Error() string {
	return "cannot build with points: " + e.err.Error() + "\n" + e.said
}

func testBuild(t *testing.T) string {
	t.Helper()
	bin, err := programs()
	harness.Must(t, err)
	return bin
}

// points asks the test build for its points.
func points(t *testing.T) []point {
	t.Helper()
	cmd := exec.Command(filepath.Join(testBuild(t), "sandboxd"))
	cmd.Env = append(os.Environ(), faultVariable+"=list")
	out, err := harness.Output(cmd)
	harness.Must(t, err)
	var all []point
	for line := range strings.Lines(string(out)) {
		f := strings.Split(strings.TrimSuffix(line, "\n"), "\t")
		if len(f) != 3 {
			t.Fatalf("the test build lists %q", line)
		}
		all = append(all, point{f[0], f[1], f[2]})
	}
	if len(all) == 0 {
		t.Fatal("the test build has no points")
	}
	return all
}

// A call of fault.At without a row would end the daemon of the suite, but only where a scenario comes to it.
func TestPointsHaveRows(t *testing.T) {
	rows := map[[2]string]bool{}
	for _, p := range points(t) {
		rows[[2]string{p.place, p.step}] = true
	}
	places := map[string]bool{}
	for r := range rows {
		places[r[0]] = true
	}
	calls := 0
	err := filepath.WalkDir(filepath.Join(harness.Root, "pkg"), func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return err
		}
		file, err := parser.ParseFile(token.NewFileSet(), path, nil, 0)
		if err != nil {
			return err
		}
		ast.Inspect(file, func(n ast.Node) bool {
			call, ok := n.(*ast.CallExpr)
			if !ok || len(call.Args) != 2 || !isFaultAt(call.Fun) {
				return true
			}
			calls++
			place, ok := literal(call.Args[0])
			if !ok || !places[place] {
				t.Errorf("%s: a point's place %q is no literal with a row in pkg/fault/points.go", path, place)
			}
			if step, ok := literal(call.Args[1]); ok && !rows[[2]string{place, step}] {
				t.Errorf("%s: the point %q of %q has no row in pkg/fault/points.go", path, step, place)
			}
			return true
		})
		return nil
	})
	harness.Must(t, err)
	if calls < 50 {
		t.Errorf("found %d calls of fault.At: the test looks in the wrong place", calls)
	}
}

func isFaultAt(fn ast.Expr) bool {
	s, ok := fn.(*ast.SelectorExpr)
	if !ok || s.Sel.Name != "At" {
		return false
	}
	x, ok := s.X.(*ast.Ident)
	return ok && x.Name == "fault"
}

func literal(e ast.Expr) (string, bool) {
	lit, ok := e.(*ast.BasicLit)
	if !ok {
		return "", false
	}
	s, err := strconv.Unquote(lit.Value)
	return s, err == nil
}

// No other build has any of it. That the test can find it, the test build shows.
func TestProductionHasNoPoints(t *testing.T) {
	has := func(path string) bool {
		b, err := os.ReadFile(path)
		harness.Must(t, err)
		return bytes.Contains(b, []byte(faultVariable)) || bytes.Contains(b, []byte("sandboxd/pkg/fault.At"))
	}
	if !has(filepath.Join(testBuild(t), "sandboxd")) {
		t.Errorf("the test build has no %s: the test finds nothing", faultVariable)
	}
	whole, err := filepath.Glob(filepath.Join(harness.Root, "bin/*"))
	harness.Must(t, err)
	if len(whole) == 0 {
		t.Fatal("nothing in bin: run make build")
	}
	for _, p := range whole {
		if has(p) {
			t.Errorf("%s has points", p)
		}
	}
}
