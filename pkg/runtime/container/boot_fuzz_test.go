package container

import (
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// FuzzBootResult: whatever an agent answers to its boot message, what is told of it is short and plain.
func FuzzBootResult(f *testing.F) {
	for _, seed := range []string{
		"", "{}", `{"error":"no"}`, `{"launched":"AAAA"}`, `{"launched":5}`, `{"error":"\u001b[2J\u0007\r\n"}`,
		`{"error":"` + strings.Repeat("\u0001", 4*maxRefusal) + `"}`, "\x1b]0;owned\x07", "[" + strings.Repeat("[", 1000),
	} {
		f.Add([]byte(seed), true)
		f.Add([]byte(seed), false)
	}
	f.Fuzz(func(t *testing.T, b []byte, launched bool) {
		answer, err := parseBootResult(b, launched)
		if err == nil {
			if launched && len(answer) == 0 {
				t.Error("nothing is said of the launch, and nobody minds")
			}
			return
		}
		const quoted = 10 // "\U0010ffff"
		if s := err.Error(); len(s) > quoted*maxRefusal+64 || strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
			t.Errorf("an error of %d bytes: %q", len(s), s)
		}
	})
}

// FuzzAgentPhase: whatever an agent leaves on its standard error is taken for a phase, or is not.
func FuzzAgentPhase(f *testing.F) {
	for _, said := range []string{"", "12 34 mounts", "1-2", "1 2", "-1 x y", "9223372036854775808 1 z", "1\u00a02 s"} {
		f.Add(spec.PhasePrefix + said + "\n")
		f.Add(said)
	}
	f.Fuzz(func(t *testing.T, line string) {
		r, ok := agentPhase(line)
		if ok && (!strings.HasPrefix(r.Phase, "agent: ") || !strings.Contains(line, spec.PhasePrefix)) {
			t.Errorf("%q is the phase %+v", line, r)
		}
	})
}
