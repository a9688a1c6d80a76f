package workload

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func (h *host) state(m *Manager, id string) State {
	h.t.Helper()
	w, err := m.Get(id)
	if err != nil {
		h.t.Fatal(err)
	}
	return w.Status.State
}

func TestPauseAndResume(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.start(m, "read x; echo $x; exit 4")
	for range 2 {
		if w, err := m.Pause(h.ctx(), id); err != nil || w.Status.State != StatePaused {
			t.Fatalf("paused: %+v, %v", w.Status, err)
		}
	}
	for what, call := range map[string]func() error{
		"exec": func() error {
			_, err := m.Exec(h.ctx(), id, spec.Process{Command: []string{"true"}})
			return err
		},
		"kill -TERM": func() error { return m.Kill(h.ctx(), id, "TERM") },
		"start": func() error {
			_, err := m.Start(h.ctx(), id)
			return err
		},
		"delete": func() error { return m.Delete(h.ctx(), id, false) },
	} {
		if err := call(); spec.KindOf(err) != spec.KindWrongState {
			t.Errorf("%s of a paused workload: %v", what, err)
		}
	}
	if _, err := m.Usage(h.ctx(), id); err != nil {
		t.Errorf("usage of a paused workload: %v", err)
	}
	// What is written to it meanwhile is there when it goes on.
	a, err := m.Attach(h.ctx(), id, false)
	if err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() { written <- a.Write(h.ctx(), []byte("hello\n")) }()
	for range 2 {
		if w, err := m.Resume(h.ctx(), id); err != nil || w.Status.State != StateRunning {
			t.Fatalf("resumed: %+v, %v", w.Status, err)
		}
	}
	if err := <-written; err != nil {
		t.Errorf("written while paused: %v", err)
	}
	if w := h.wait(m, id); w.Status.Exit == nil || w.Status.Exit.Code != 4 || h.logs(m, id) != "hello\n" {
		t.Errorf("ended as %+v, wrote %q", w.Status, h.logs(m, id))
	}
	for what, call := range map[string]func(context.Context, string) (Workload, error){"pause": m.Pause, "resume": m.Resume} {
		if _, err := call(h.ctx(), id); spec.KindOf(err) != spec.KindWrongState {
			t.Errorf("%s of an exited workload: %v", what, err)
		}
	}
}

// Each of these ends a paused workload, in the usual state and with nothing left.
func TestPausedIsEnded(t *testing.T) {
	for what, end := range map[string]func(context.Context, *Manager, string) error{
		"stop": func(ctx context.Context, m *Manager, id string) error {
			_, err := m.Stop(ctx, id, 10*time.Second)
			return err
		},
		"stop at once": func(ctx context.Context, m *Manager, id string) error {
			_, err := m.Stop(ctx, id, 0)
			return err
		},
		"kill":      func(ctx context.Context, m *Manager, id string) error { return m.Kill(ctx, id, "") },
		"remove -f": func(ctx context.Context, m *Manager, id string) error { return m.Delete(ctx, id, true) },
	} {
		t.Run(what, func(t *testing.T) {
			h := newHost(t)
			m := h.boot()
			id := h.start(m, "exec sleep 1000")
			if _, err := m.Pause(h.ctx(), id); err != nil {
				t.Fatal(err)
			}
			if err := end(h.ctx(), m, id); err != nil {
				t.Fatal(err)
			}
			if what != "remove -f" {
				if w := h.wait(m, id); w.Status.State != StateExited || w.Status.Exit.Signal == 0 {
					t.Errorf("ended as %+v", w.Status)
				}
				if err := m.Delete(h.ctx(), id, false); err != nil {
					t.Error(err)
				}
			}
			if left := h.sandboxes(); len(left) > 0 {
				t.Errorf("left on the host: %v", left)
			}
		})
	}
}

// A daemon that comes back finds a paused workload paused; one that died between its record and the deed finishes the deed.
func TestPauseSurvivesTheDaemon(t *testing.T) {
	h := newHost(t)
	m := h.open()
	out := filepath.Join(h.dir, "out")
	id := h.start(m, fmt.Sprintf("read x; echo $x >%s; exit 2", out))
	if _, err := m.Exec(h.ctx(), id, spec.Process{Command: []string{"sleep", "1000"}}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Pause(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	for _, real := range []string{"frozen", "running"} {
		if real == "running" { // as if the daemon had died before it did what the record says
			e, err := m.find(id)
			if err != nil {
				t.Fatal(err)
			}
			_, r, _ := e.peek()
			if err := r.inst.(interface{ Resume() error }).Resume(); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		m = h.open()
		if s := h.state(m, id); s != StatePaused {
			t.Fatalf("back, it is %s", s)
		}
		if _, err := m.Exec(h.ctx(), id, spec.Process{Command: []string{"true"}}); spec.KindOf(err) != spec.KindWrongState {
			t.Errorf("exec of a paused workload: %v", err)
		}
		a, err := m.Attach(h.ctx(), id, false)
		if err != nil {
			t.Fatal(err)
		}
		short, cancel := context.WithTimeout(h.ctx(), 200*time.Millisecond)
		defer cancel()
		if err := a.Write(short, []byte(real+"\n")); err == nil {
			t.Error("a paused workload takes input")
		}
		if _, err := os.Stat(out); err == nil {
			t.Errorf("a paused workload went on")
		}
	}
	// And the other way round: the record says that it runs.
	if _, err := m.Resume(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	e, err := m.find(id)
	if err != nil {
		t.Fatal(err)
	}
	_, r, _ := e.peek()
	if err := r.inst.(interface{ Pause(context.Context) error }).Pause(h.ctx()); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = h.boot()
	a, err := m.Attach(h.ctx(), id, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Write(h.ctx(), []byte("go\n")); err != nil {
		t.Fatal(err)
	}
	if w := h.wait(m, id); w.Status.Exit == nil || w.Status.Exit.Code != 2 {
		t.Errorf("ended as %+v", w.Status)
	}
}

// The process ends in the moment in which it is paused: however it comes out, the workload comes to its end.
func TestPauseRacesWithTheEnd(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	for range 20 {
		id := h.start(m, "exit 3")
		_, err := m.Pause(h.ctx(), id)
		if err != nil && spec.KindOf(err) != spec.KindWrongState {
			t.Fatal(err)
		}
		if _, err := m.Resume(h.ctx(), id); err != nil && spec.KindOf(err) != spec.KindWrongState {
			t.Fatal(err)
		}
		if w := h.wait(m, id); w.Status.Exit == nil || w.Status.Exit.Code != 3 {
			t.Fatalf("ended as %+v", w.Status)
		}
	}
}
