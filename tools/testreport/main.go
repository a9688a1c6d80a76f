// Command testreport reads what `go test -json` writes and prints what a person needs of it: the closing line of each
// package, all that a failing test said, how many tests ran, and every skip. A skip that is not on the list of allowed
// ones is a failure: a test that quietly does nothing must not pass for one that passed.
//
//	go test -json ./... | testreport -allow test/skips.txt
package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

func main() {
	allow := flag.String("allow", "", "`file` of allowed skips: package, test, then the reason, one a line")
	flag.Parse()
	if err := run(os.Stdin, os.Stdout, *allow); err != nil {
		fmt.Fprintln(os.Stderr, "testreport:", err)
		os.Exit(1)
	}
}

func run(in io.Reader, out io.Writer, allowFile string) error {
	allowed := map[string]string{}
	if allowFile != "" {
		f, err := os.Open(allowFile)
		if err != nil {
			return fmt.Errorf("cannot read list of allowed skips: %w", err)
		}
		defer f.Close()
		if allowed, err = readAllowed(f); err != nil {
			return fmt.Errorf("cannot read %s: %w", allowFile, err)
		}
	}
	r := newReport(out)
	if err := r.read(in); err != nil {
		return err
	}
	return r.finish(allowed)
}

// readAllowed returns the reason of each allowed skip, by "package test".
func readAllowed(in io.Reader) (map[string]string, error) {
	allowed := map[string]string{}
	lines := bufio.NewScanner(in)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(lines.Text())
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		fields := strings.Fields(line)
		if len(fields) < 3 {
			return nil, fmt.Errorf("line %d: want package, test and a reason", n)
		}
		allowed[fields[0]+" "+fields[1]] = strings.Join(fields[2:], " ")
	}
	return allowed, lines.Err()
}

// event is one line of `go test -json`; see `go doc test2json`.
type event struct {
	Action     string
	Package    string
	ImportPath string
	Test       string
	Elapsed    float64
	Output     string
}

type report struct {
	out io.Writer
	// What each running test said so far, by "package test".
	said    map[string]*strings.Builder
	passed  int
	failed  []string
	skipped []string
	slow    []timing
}

type timing struct {
	test    string
	seconds float64
}

// A person looks at so many of the slowest tests, and at none that took less than a second.
const (
	slowest    = 8
	slowEnough = 1.0
)

func newReport(out io.Writer) *report {
	return &report{out: out, said: map[string]*strings.Builder{}}
}

func (r *report) read(in io.Reader) error {
	dec := json.NewDecoder(in)
	for {
		var e event
		if err := dec.Decode(&e); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("cannot read output of go test -json: %w", err)
		}
		r.add(e)
	}
}

func (r *report) add(e event) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "build-output":
		fmt.Fprint(r.out, e.Output)
	case "output":
		if e.Test == "" && isClosingLine(e.Output) {
			fmt.Fprint(r.out, e.Output)
			return
		}
		if r.said[key] == nil {
			r.said[key] = &strings.Builder{}
		}
		r.said[key].WriteString(e.Output)
	case "pass":
		r.end(key, e)
		if e.Test != "" {
			r.passed++
		}
	case "skip":
		if e.Test != "" {
			r.skipped = append(r.skipped, key)
			fmt.Fprint(r.out, r.text(key))
		}
		r.end(key, e)
	case "fail", "build-fail":
		fmt.Fprint(r.out, r.text(key))
		r.end(key, e)
		r.failed = append(r.failed, strings.TrimSpace(e.ImportPath+key))
	}
}

func (r *report) text(key string) string {
	if b := r.said[key]; b != nil {
		return b.String()
	}
	return ""
}

func (r *report) end(key string, e event) {
	delete(r.said, key)
	if e.Test != "" && !strings.Contains(e.Test, "/") && e.Elapsed >= slowEnough {
		r.slow = append(r.slow, timing{key, e.Elapsed})
	}
}

// isClosingLine tells the one line per package that go test ends with from what the package's TestMain printed.
func isClosingLine(s string) bool {
	return strings.HasPrefix(s, "ok  \t") || strings.HasPrefix(s, "FAIL\t") || strings.HasPrefix(s, "---\t")
}

func (r *report) finish(allowed map[string]string) error {
	slices.SortFunc(r.slow, func(a, b timing) int { return int(1000 * (b.seconds - a.seconds)) })
	for _, t := range r.slow[:min(slowest, len(r.slow))] {
		fmt.Fprintf(r.out, "slow: %5.1f s %s\n", t.seconds, t.test)
	}
	var unexpected []string
	for _, s := range r.skipped {
		reason, ok := allowed[s]
		if !ok {
			unexpected = append(unexpected, s)
			reason = "NOT ALLOWED"
		}
		fmt.Fprintf(r.out, "skipped: %s (%s)\n", s, reason)
	}
	fmt.Fprintf(r.out, "tests: %d passed, %d failed, %d skipped\n", r.passed, len(r.failed), len(r.skipped))
	switch {
	case len(r.failed) > 0:
		return fmt.Errorf("failed:\n\t%s", strings.Join(r.failed, "\n\t"))
	case len(unexpected) > 0:
		return fmt.Errorf("skipped without leave:\n\t%s\nmake them run, or add them with a reason to the list of allowed skips", strings.Join(unexpected, "\n\t"))
	case r.passed == 0:
		return errors.New("no test ran")
	}
	return nil
}
