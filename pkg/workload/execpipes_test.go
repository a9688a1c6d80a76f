package workload

import (
	"context"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// apart is an instance to whose agent nothing can be handed, as a VM is.
type apart struct{ runtime.Instance }

func outputPipes(t *testing.T) (p *OutputPipes, stdout, stderr *os.File) {
	t.Helper()
	var ends [4]*os.File
	for i := range 2 {
		r, w, err := os.Pipe()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { r.Close() })
		ends[2*i], ends[2*i+1] = r, w
	}
	return &OutputPipes{Stdout: ends[1], Stderr: ends[3]}, ends[0], ends[2]
}

// The caller sees no difference between a process that has the pipes and one whose output is brought to them.
func TestExecInto(t *testing.T) {
	for name, wrap := range map[string]func(runtime.Instance) runtime.Instance{
		"handed over": func(i runtime.Instance) runtime.Instance { return i },
		"filled":      func(i runtime.Instance) runtime.Instance { return apart{i} },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			m := h.boot()
			id := h.start(m, "exec sleep 1000")
			e, err := m.find(id)
			if err != nil {
				t.Fatal(err)
			}
			r, err := e.running()
			if err != nil {
				t.Fatal(err)
			}
			r.inst = wrap(r.inst)
			pipes, stdout, stderr := outputPipes(t)
			s, err := m.ExecInto(h.ctx(), id, spec.Process{Command: []string{"/bin/sh", "-c", "cat; echo e >&2; exit 6"}, Stdin: true}, pipes)
			if err != nil {
				t.Fatal(err)
			}
			if handed := s.(*execSession).handed; handed != (name == "handed over") {
				t.Errorf("handed over: %v", handed)
			}
			input := strings.Repeat("0123456789abcdef", 100000)
			got := make(chan string, 2)
			for _, f := range []*os.File{stdout, stderr} {
				go func() {
					b, err := io.ReadAll(f)
					if err != nil {
						t.Error(err)
					}
					got <- string(b)
				}()
			}
			ended := make(chan error, 1)
			go func() {
				ended <- s.Output(h.ctx(), func(Stream, []byte) error { t.Error("output in the session"); return nil })
			}()
			if err := s.Write(h.ctx(), []byte(input)); err != nil {
				t.Error(err)
			}
			if err := s.CloseStdin(h.ctx()); err != nil {
				t.Error(err)
			}
			if err := <-ended; err != nil {
				t.Error(err)
			}
			a, b := <-got, <-got
			if len(a) > len(b) {
				a, b = b, a
			}
			x, err := s.Wait(h.ctx())
			if err != nil || x.Code != 6 || a != "e\n" || b != input {
				t.Errorf("exit %+v, %v; %d bytes on one pipe, %q on the other", x, err, len(b), a)
			}
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A caller that does not read can still end it, and one that has closed its end is told.
func TestExecIntoPipesThatNobodyReads(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.start(m, "exec sleep 1000")
	e, err := m.find(id)
	if err != nil {
		t.Fatal(err)
	}
	r, err := e.running()
	if err != nil {
		t.Fatal(err)
	}
	r.inst = apart{r.inst}
	pipes, _, _ := outputPipes(t)
	s, err := m.ExecInto(h.ctx(), id, spec.Process{Command: []string{"yes"}}, pipes)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(h.ctx())
	ended := make(chan error, 1)
	go func() { ended <- s.Output(ctx, nil) }()
	cancel()
	if err := <-ended; err == nil {
		t.Error("its end was not told")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}

	pipes, stdout, _ := outputPipes(t)
	if s, err = m.ExecInto(h.ctx(), id, spec.Process{Command: []string{"yes"}}, pipes); err != nil {
		t.Fatal(err)
	}
	stdout.Close()
	if err := s.Output(h.ctx(), nil); spec.KindOf(err) != spec.KindWrongState {
		t.Errorf("after its reader closed: %v, want a wrong state", err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	pipes, _, _ = outputPipes(t)
	if _, err := m.ExecInto(h.ctx(), id, spec.Process{Command: []string{"yes"}, Terminal: true}, pipes); spec.KindOf(err) != spec.KindInvalid {
		t.Errorf("with a terminal: %v, want invalid", err)
	}
	if _, err := pipes.Stdout.Write([]byte("x")); err == nil {
		t.Error("an exec that failed leaves the pipes open")
	}
}
