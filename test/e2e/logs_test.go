package e2e

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"
)

func TestLogsAreCompleteAndInOrder(t *testing.T) {
	const lines = 200_000
	var want strings.Builder
	for i := range lines {
		fmt.Fprintln(&want, i+1)
	}
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "seq", fmt.Sprint(lines))
		w.Call(t, "wait", id).WantOut(t, "0\n")
		w.Call(t, "logs", id).WantOut(t, want.String())
		w.Call(t, "logs", "--tail", "3", id).WantOut(t, "199998\n199999\n200000\n")
		w.Call(t, "logs", "--tail", "0", id).WantOut(t, "")
	})
}

func TestLogsKeepStreamsApart(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sh", "-c", "echo to stdout; echo to stderr >&2; printf 'no newline'")
		w.Call(t, "wait", id)
		r := w.Call(t, "logs", id)
		if r.Stdout != "to stdout\nno newline" || r.Stderr != "to stderr\n" {
			t.Errorf("stdout %q, stderr %q", r.Stdout, r.Stderr)
		}
	})
}

func TestLogsFollow(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sh", "-c", "for i in 1 2 3; do echo $i; sleep 0.3; done; exit 1")
		// Ends by itself when the workload does, with all of its output.
		w.Call(t, "logs", "-f", id).WantOut(t, "1\n2\n3\n")
		w.Call(t, "wait", id).WantOut(t, "1\n")
		w.Call(t, "logs", "-f", id).WantOut(t, "1\n2\n3\n")
	})
}

func TestLogsByTime(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sh", "-c", "echo early; sleep 2; echo late")
		began := time.Now()
		w.Call(t, "wait", id)
		if took := time.Since(began); took < time.Second {
			t.Fatalf("the workload ended %s after its start: it must have slept 2 s", took)
		}
		stamped := w.Call(t, "logs", "--timestamps", id).Stdout
		line := regexp.MustCompile(`(?m)^(\d{4}-\d\d-\d\dT\S+) (early|late)$`)
		found := line.FindAllStringSubmatch(stamped, -1)
		if len(found) != 2 {
			t.Fatalf("logs --timestamps wrote %q, want two lines that begin with a time", stamped)
		}
		var times [2]time.Time
		for i, f := range found {
			at, err := time.Parse(time.RFC3339Nano, f[1])
			if err != nil || time.Since(at).Abs() > 10*time.Minute {
				t.Errorf("time %s of %q: %v", f[1], f[2], err)
			}
			times[i] = at
		}
		if gap := times[1].Sub(times[0]); gap < 1500*time.Millisecond {
			t.Errorf("the lines were written 2 s apart, their times say %s", gap)
		}
		between := times[0].Add(times[1].Sub(times[0]) / 2)
		w.Call(t, "logs", "--since", between.Format(time.RFC3339Nano), id).WantOut(t, "late\n")
		w.Call(t, "logs", "--since", "1h", id).WantOut(t, "early\nlate\n")
	})
}

// The agent holds output back when nobody reads: a workload that writes more than anyone keeps in memory loses nothing.
func TestLogsOfMuchOutput(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		// 64 MiB; the checksum is of the same bytes made on this side.
		id := w.Start(t, busybox, "sh", "-c", "yes 0123456789abcde | head -c 67108864")
		w.Call(t, "wait", id).WantOut(t, "0\n")
		out := &lineChecker{line: "0123456789abcde\n"}
		w.Command("logs", id).WithStdout(out).Run().Want(t, 0)
		if out.n != 64<<20 || out.wrong != "" {
			t.Errorf("got %d bytes of %d; first wrong: %q", out.n, 64<<20, out.wrong)
		}
	})
}

// lineChecker wants the same line again and again.
type lineChecker struct {
	line  string
	n     int
	wrong string
}

func (c *lineChecker) Write(p []byte) (int, error) {
	for i, b := range p {
		if c.wrong == "" && b != c.line[(c.n+i)%len(c.line)] {
			c.wrong = fmt.Sprintf("byte %d: %q", c.n+i, abridged(string(p[i:])))
		}
	}
	c.n += len(p)
	return len(p), nil
}
