package workload

import (
	"context"
	"errors"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// runner is a caller of Run, and who is told of its steps.
type runner struct {
	h *host
	m *Manager

	mu    sync.Mutex
	steps []RunEvent
	errs  []error
}

func (r *runner) options(script string) RunOptions {
	return RunOptions{
		CreateOptions: CreateOptions{RemoveWhenEnded: true, Spec: spec.Workload{
			Image: "busybox", Isolation: spec.IsolationContainer, Process: spec.Process{Command: []string{"/bin/sh", "-c", script}},
		}},
		Begin: func(e RunEvent) func(string, error) error {
			return func(_ string, err error) error {
				r.mu.Lock()
				defer r.mu.Unlock()
				r.steps, r.errs = append(r.steps, e), append(r.errs, err)
				return err
			}
		},
	}
}

// told waits until the last of the steps was told of, and answers with all.
func (r *runner) told(last RunEvent) []RunEvent {
	r.h.t.Helper()
	for deadline := time.Now().Add(waitLimit); ; time.Sleep(time.Millisecond) {
		r.mu.Lock()
		steps := slices.Clone(r.steps)
		r.mu.Unlock()
		if slices.Contains(steps, last) {
			return steps
		}
		if time.Now().After(deadline) {
			r.h.t.Fatalf("told of %v, not of %v", steps, last)
		}
	}
}

func (r *runner) none() {
	r.h.t.Helper()
	if list, _, err := r.m.List(Filter{}, 100, ""); err != nil || len(list) != 0 {
		r.h.t.Errorf("workloads are left: %v, %v", list, err)
	}
	if ids, err := r.h.rt.List(r.h.ctx()); err != nil || len(ids) != 0 {
		r.h.t.Errorf("sandboxes are left: %v, %v", ids, err)
	}
}

func TestRunIsAWholeLife(t *testing.T) {
	h := newHost(t)
	r := &runner{h: h, m: h.boot()}
	var events []RunEvent
	var ended Workload
	err := r.m.Run(h.ctx(), r.options("exit 7"), func(e RunEvent, w Workload) error {
		events = append(events, e)
		if e >= RunEnded {
			ended = w
		}
		return nil
	})
	if err != nil || !slices.Equal(events, []RunEvent{RunCreated, RunStarted, RunEnded, RunRemoved}) {
		t.Errorf("Run told of %v, %v", events, err)
	}
	if ended.Status.State != StateExited || ended.Status.Exit == nil || ended.Status.Exit.Code != 7 {
		t.Errorf("it ended as %+v", ended.Status)
	}
	if got := r.told(RunRemoved); !slices.Equal(got, []RunEvent{RunCreated, RunStarted, RunRemoved}) {
		t.Errorf("steps %v", got)
	}
	r.none()

	o := r.options("exit 3")
	o.RemoveWhenEnded, o.Quiet = false, true
	events = nil
	if err := r.m.Run(h.ctx(), o, func(e RunEvent, w Workload) error { events, ended = append(events, e), w; return nil }); err != nil || !slices.Equal(events, []RunEvent{RunStarted, RunEnded}) {
		t.Errorf("Run that removes nothing told of %v, %v", events, err)
	}
	if w, err := r.m.Get(ended.ID); err != nil || w.Status.Exit == nil || w.Status.Exit.Code != 3 {
		t.Errorf("it is there as %+v, %v", w.Status, err)
	}
}

// Who goes away misses the answers and nothing else; with Detach that is what he asked for.
func TestRunGoesOnWithoutItsCaller(t *testing.T) {
	gone := errors.New("gone")
	for name, c := range map[string]struct {
		detach bool
		leave  RunEvent
	}{"after the creation": {false, RunCreated}, "after the start": {false, RunStarted}, "detached": {true, 0}} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			r := &runner{h: h, m: h.boot()}
			ctx, cancel := context.WithCancel(h.ctx())
			defer cancel()
			o := r.options("exit 5")
			o.Detach = c.detach
			err := r.m.Run(ctx, o, func(e RunEvent, _ Workload) error {
				if e == c.leave {
					cancel()
					return gone
				}
				return nil
			})
			if want := map[bool]error{true: nil, false: gone}[c.detach]; !errors.Is(err, want) {
				t.Errorf("Run = %v", err)
			}
			r.told(RunRemoved)
			r.none()
		})
	}
}

// A start that fails leaves what says why, or nothing if that is to be removed.
func TestRunOfWhatCannotStart(t *testing.T) {
	h := newHost(t)
	r := &runner{h: h, m: h.boot()}
	o := r.options("")
	o.Spec.Process.Command = []string{"/nonexistent"}
	if err := r.m.Run(h.ctx(), o, func(RunEvent, Workload) error { return nil }); spec.ReasonOf(err) != spec.ReasonProcessNotFound {
		t.Errorf("Run = %v", err)
	}
	r.none()
	o.RemoveWhenEnded = false
	if err := r.m.Run(h.ctx(), o, func(RunEvent, Workload) error { return nil }); spec.ReasonOf(err) != spec.ReasonProcessNotFound {
		t.Errorf("Run = %v", err)
	}
	if list, _, err := r.m.List(Filter{}, 100, ""); err != nil || len(list) != 1 || list[0].Status.Exit == nil || list[0].Status.Exit.Code != 127 {
		t.Errorf("left is %v, %v", list, err)
	}
	o.Spec.Image = "nothing"
	told := len(r.steps)
	if err := r.m.Run(h.ctx(), o, func(RunEvent, Workload) error { return nil }); spec.KindOf(err) != spec.KindNotFound {
		t.Errorf("Run of no image = %v", err)
	}
	if list, _, _ := r.m.List(Filter{}, 100, ""); len(list) != 1 || len(r.steps) != told+1 {
		t.Errorf("bad input changed something: %v, steps %v", list, r.steps[told:])
	}
}

// A retry with the same key goes on with the same workload, and starts nothing twice.
func TestRetriedRunMakesNoTwin(t *testing.T) {
	h := newHost(t)
	r := &runner{h: h, m: h.boot()}
	o := r.options("sleep 0.2; exit 4")
	o.RemoveWhenEnded, o.Key = false, "k"
	var ids [2]string
	var both sync.WaitGroup
	for i := range ids {
		both.Go(func() {
			if err := r.m.Run(h.ctx(), o, func(_ RunEvent, w Workload) error { ids[i] = w.ID; return nil }); err != nil {
				t.Errorf("Run = %v", err)
			}
		})
	}
	both.Wait()
	if ids[0] == "" || ids[0] != ids[1] {
		t.Errorf("two workloads: %v", ids)
	}
	if w, err := r.m.Get(ids[0]); err != nil || w.Status.Exit == nil || w.Status.Exit.Code != 4 {
		t.Errorf("it is %+v, %v", w.Status, err)
	}
	starts := 0
	for _, s := range r.steps {
		if s == RunStarted {
			starts++
		}
	}
	if starts != 1 {
		t.Errorf("started %d times", starts)
	}
}

// What was to be removed at its end is removed by the next daemon, whatever it was doing when this one died, and it is told.
func TestNextDaemonRemovesWhatRunEnded(t *testing.T) {
	h := newHost(t)
	r := &runner{h: h, m: h.open()}
	started := make(chan string, 1)
	running := make(chan struct{})
	go func() {
		defer close(running)
		_ = r.m.Run(h.ctx(), r.options("exec sleep 1000"), func(e RunEvent, w Workload) error {
			if e == RunStarted {
				started <- w.ID
			}
			return nil
		})
	}()
	id := <-started
	if err := r.m.Close(); err != nil {
		t.Fatal(err)
	}
	<-running
	next := h.boot()
	if w, err := next.Get(id); err != nil || w.Status.State != StateRunning || !w.RemoveWhenEnded {
		t.Fatalf("after a restart it is %+v, %v", w.Status, err)
	}
	if err := next.Kill(h.ctx(), id, "KILL"); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(waitLimit); ; time.Sleep(time.Millisecond) {
		if _, err := next.Get(id); spec.KindOf(err) == spec.KindNotFound {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("it is there yet")
		}
	}
	(&runner{h: h, m: next}).none()
}
