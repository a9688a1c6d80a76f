package agent_test

import (
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func TestTerminal(t *testing.T) {
	s := newSandbox(t)
	p, err := s.start(process{args: []string{"sh", "-c", "trap 'stty size; echo resized' WINCH; tty; stty size; ls -l /proc/self/fd/0 >/dev/null; echo >/dev/tty opened; echo ready; until read line; do :; done; echo got $line; cat; echo ended"},
		tty: &specs.Box{Height: 33, Width: 101}, user: "user"})
	if err != nil {
		t.Fatal(err)
	}
	var offset uint64
	out := readUntil(t, p, &offset, "ready")
	for _, want := range []string{"/dev/pts/0", "33 101", "opened"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in %q", want, out)
		}
	}
	if err := p.Resize(t.Context(), spec.TerminalSize{Rows: 50, Columns: 132}); err != nil {
		t.Fatal(err)
	}
	readUntil(t, p, &offset, "50 132\r\nresized")
	accepted, _, err := p.WriteInput(t.Context(), 0, []byte("hello\n"), false)
	if err != nil {
		t.Fatal(err)
	}
	readUntil(t, p, &offset, "got hello")
	if _, _, err := p.WriteInput(t.Context(), accepted, nil, true); err != nil {
		t.Fatal(err)
	}
	readUntil(t, p, &offset, "ended")
	if exit, err := p.Wait(t.Context()); err != nil || exit.Code != 0 {
		t.Errorf("%+v %v", exit, err)
	}
	if err := p.Release(t.Context()); err != nil {
		t.Error(err)
	}
	if err := s.mustStart("true").Resize(t.Context(), spec.TerminalSize{Rows: 1, Columns: 1}); spec.KindOf(err) != spec.KindWrongState {
		t.Errorf("resized without a terminal: %v", err)
	}
}

// TestTerminalInterrupt: control-C reaches the foreground group of the terminal, so it is the controlling one.
func TestTerminalInterrupt(t *testing.T) {
	s := newSandbox(t)
	p, err := s.start(process{args: []string{"sh", "-c", "echo ready; exec sleep 100"}, tty: &specs.Box{}})
	if err != nil {
		t.Fatal(err)
	}
	var offset uint64
	readUntil(t, p, &offset, "ready")
	if _, _, err := p.WriteInput(t.Context(), 0, []byte{3}, false); err != nil {
		t.Fatal(err)
	}
	if exit, err := p.Wait(t.Context()); err != nil || exit.Signal != 2 || exit.Code != 130 {
		t.Errorf("%+v %v", exit, err)
	}
}
