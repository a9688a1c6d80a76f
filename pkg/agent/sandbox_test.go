package agent_test

import (
	"testing"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func TestExitCodes(t *testing.T) {
	s := newSandbox(t)
	for _, c := range []struct {
		script string
		want   spec.Exit
	}{
		{"exit 0", spec.Exit{}},
		{"exit 7", spec.Exit{Code: 7}},
		{"exit 255", spec.Exit{Code: 255}},
		{"kill -KILL $$", spec.Exit{Code: 137, Signal: 9}},
		{"kill -TERM $$", spec.Exit{Code: 143, Signal: 15}},
	} {
		got := s.run(process{args: []string{"sh", "-c", c.script}}).exit
		got.Time = c.want.Time
		if got != c.want {
			t.Errorf("%s: got %+v, want %+v", c.script, got, c.want)
		}
	}
	for _, c := range []struct {
		name   string
		p      process
		reason string
		field  string
	}{
		{"missing", process{args: []string{"nosuchprogram"}}, spec.ReasonProcessNotFound, "process.command"},
		{"missing path", process{args: []string{"/no/such"}}, spec.ReasonProcessNotFound, "process.command"},
		{"not executable", process{args: []string{"plain"}}, spec.ReasonProcessNotExecutable, "process.command"},
		{"no program", process{args: []string{"/bin/garbage"}}, spec.ReasonProcessNotExecutable, "process.command"},
		{"directory", process{args: []string{"/etc"}}, spec.ReasonProcessNotExecutable, "process.command"},
		{"no such user", process{args: []string{"true"}, user: "nobody"}, "", "process.user"},
		{"no such directory", process{args: []string{"true"}, cwd: "/nowhere"}, "", "process.working_dir"},
		{"file as directory", process{args: []string{"true"}, cwd: "/etc/passwd"}, "", "process.working_dir"},
	} {
		_, err := s.start(c.p)
		if err == nil || spec.ReasonOf(err) != c.reason || err.(*spec.Error).Field != c.field {
			t.Errorf("%s: got %v (%q)", c.name, err, spec.ReasonOf(err))
		}
	}
}
