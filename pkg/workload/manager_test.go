package workload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

func TestLifeOfAWorkload(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.create(m, "echo out; echo err >&2; exit 3")
	if w, err := m.Get(id); err != nil || w.Status.State != StateCreated || w.Status.Decision.Rule != "no-policy" {
		t.Fatalf("created: %+v, %v", w.Status, err)
	}
	if _, err := m.Start(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	w := h.wait(m, id)
	if w.Status.State != StateExited || w.Status.Exit == nil || w.Status.Exit.Code != 3 {
		t.Fatalf("ended as %+v", w.Status)
	}
	if got := h.logs(m, id); !strings.Contains(got, "out\n") || !strings.Contains(got, "err\n") {
		t.Errorf("logs are %q", got)
	}
	// It can be started again; its output is appended.
	if _, err := m.Start(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	h.wait(m, id)
	if got := strings.Count(h.logs(m, id), "out\n"); got != 2 {
		t.Errorf("%d runs in the logs, want 2", got)
	}
	if err := m.Delete(h.ctx(), id, false); err != nil {
		t.Fatal(err)
	}
	if _, err := m.Get(id); spec.KindOf(err) != spec.KindNotFound {
		t.Errorf("after deletion Get says %v", err)
	}
	if left := h.sandboxes(); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
	if _, err := os.Stat(filepath.Join(h.dir, "state/workloads", id)); !os.IsNotExist(err) {
		t.Errorf("output is still there: %v", err)
	}
}

func TestSignalledProcessHasItsSignal(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.start(m, "echo up; exec sleep 1000")
	h.awaitOutput(m, id, "up")
	if err := m.Kill(h.ctx(), id, "SIGUSR1"); err != nil {
		t.Fatal(err)
	}
	if x := h.wait(m, id).Status.Exit; x == nil || x.Code != 128+int(syscall.SIGUSR1) || x.Signal != int(syscall.SIGUSR1) {
		t.Errorf("exit %+v", x)
	}
}

func TestStopGivesGrace(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	polite := h.start(m, "trap 'echo bye; exit 9' TERM; echo up; while :; do sleep 0.05; done")
	stubborn := h.start(m, "trap '' TERM; echo up; while :; do sleep 0.05; done")
	h.awaitOutput(m, polite, "up")
	h.awaitOutput(m, stubborn, "up")
	w, err := m.Stop(h.ctx(), polite, waitLimit)
	if err != nil || w.Status.State != StateExited || w.Status.Exit.Code != 9 || !strings.Contains(h.logs(m, polite), "bye") {
		t.Errorf("polite: %+v, %v", w.Status, err)
	}
	w, err = m.Stop(h.ctx(), stubborn, 200*time.Millisecond)
	if err != nil || w.Status.State != StateExited || w.Status.Exit.Code != 137 {
		t.Errorf("stubborn: %+v, %v", w.Status, err)
	}
	if w, err := m.Stop(h.ctx(), polite, time.Second); err != nil || w.Status.Exit.Code != 9 {
		t.Errorf("stopping a stopped one: %+v, %v", w.Status, err)
	}
}

// What the process wrote just before its end must not be lost.
func TestLastOutputIsKept(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.start(m, "head -c 300000 /dev/zero | tr '\\0' x; exit 4")
	if w := h.wait(m, id); w.Status.Exit == nil || w.Status.Exit.Code != 4 {
		t.Fatalf("ended as %+v", w.Status)
	}
	if n := len(h.logs(m, id)); n != 300000 {
		t.Errorf("%d bytes of output, want 300000", n)
	}
}

func TestStartOfWhatCannotRun(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	for command, want := range map[string]struct {
		code   int
		reason string
	}{
		"/no/such/thing": {127, spec.ReasonProcessNotFound},
		"/etc/passwd":    {126, spec.ReasonProcessNotExecutable},
	} {
		w, err := m.Create(h.ctx(), CreateOptions{Spec: spec.Workload{
			Image: "busybox", Isolation: spec.IsolationContainer, Process: spec.Process{Command: []string{command}},
		}})
		if err != nil {
			t.Fatal(err)
		}
		_, err = m.Start(h.ctx(), w.ID)
		if spec.ReasonOf(err) != want.reason {
			t.Errorf("%s: start says %v", command, err)
		}
		if w := h.wait(m, w.ID); w.Status.State != StateExited || w.Status.Exit.Code != want.code {
			t.Errorf("%s: %+v", command, w.Status)
		}
		if err := m.Delete(h.ctx(), w.ID, false); err != nil {
			t.Error(err)
		}
	}
	if left := h.sandboxes(); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
}

func TestFailedStartLeavesNothing(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.create(m, "true")
	h.rt.beforeStart = func(context.Context) error { return errors.New("no walls today") }
	if _, err := m.Start(h.ctx(), id); err == nil || !strings.Contains(err.Error(), "no walls today") {
		t.Fatalf("start says %v", err)
	}
	if w, _ := m.Get(id); w.Status.State != StateFailed || !strings.Contains(w.Status.Message, "no walls today") {
		t.Fatalf("state %+v", w.Status)
	}
	// It can be tried again.
	h.rt.beforeStart = nil
	if _, err := m.Start(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	if w := h.wait(m, id); w.Status.State != StateExited || w.Status.Message != "exited with code 0" {
		t.Errorf("second start: %+v", w.Status)
	}
	if err := m.Delete(h.ctx(), id, false); err != nil {
		t.Fatal(err)
	}
	if left := h.sandboxes(); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
}

func TestForceDeletesWhatIsStarting(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.create(m, "true")
	entered := make(chan struct{})
	h.rt.beforeStart = func(ctx context.Context) error {
		close(entered)
		<-ctx.Done()
		return ctx.Err()
	}
	started := make(chan error, 1)
	go func() {
		_, err := m.Start(h.ctx(), id)
		started <- err
	}()
	<-entered
	if err := m.Delete(h.ctx(), id, true); err != nil {
		t.Fatal(err)
	}
	if err := <-started; err == nil {
		t.Error("a start that was called off says it succeeded")
	}
	if _, err := m.Get(id); spec.KindOf(err) != spec.KindNotFound {
		t.Errorf("after deletion Get says %v", err)
	}
}

func TestVerbsRefuseTheWrongState(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.create(m, "exec sleep 1000")
	refused := func(what string, err error, words string) {
		t.Helper()
		if spec.KindOf(err) != spec.KindWrongState || !strings.Contains(err.Error(), words) {
			t.Errorf("%s says %v, want a wrong state that says %q", what, err, words)
		}
	}
	_, err := m.Exec(h.ctx(), id, spec.Process{Command: []string{"true"}})
	refused("exec", err, "created")
	refused("kill", m.Kill(h.ctx(), id, ""), "created")
	_, err = m.Stop(h.ctx(), id, 0)
	refused("stop", err, "created")
	refused("copy", m.CopyOut(h.ctx(), id, "/", io.Discard), "created")
	if _, err := m.Start(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	_, err = m.Start(h.ctx(), id)
	refused("second start", err, "running")
	refused("delete", m.Delete(h.ctx(), id, false), "running")
	if err := m.Delete(h.ctx(), id, true); err != nil {
		t.Fatal(err)
	}
}

func TestNamesAreUniqueAndFindWorkloads(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	o := CreateOptions{Name: "job", Spec: spec.Workload{Image: "busybox", Isolation: spec.IsolationContainer}}
	w, err := m.Create(h.ctx(), o)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := m.Create(h.ctx(), o); spec.KindOf(err) != spec.KindAlreadyExists {
		t.Errorf("second of the same name: %v", err)
	}
	for _, ref := range []string{"job", w.ID, w.ID[:4], w.ID[:12]} {
		if got, err := m.Get(ref); err != nil || got.ID != w.ID {
			t.Errorf("Get(%q): %v, %v", ref, got.ID, err)
		}
	}
	for _, ref := range []string{"jo", w.ID[:3], ""} {
		if _, err := m.Get(ref); spec.KindOf(err) != spec.KindNotFound {
			t.Errorf("Get(%q): %v", ref, err)
		}
	}
	// Many creators of one name: one wins, and nothing of the others is recorded.
	var g errgroup.Group
	won := make(chan string, 50)
	for range 50 {
		g.Go(func() error {
			w, err := m.Create(h.ctx(), CreateOptions{Name: "race", Spec: o.Spec})
			if err == nil {
				won <- w.ID
			} else if spec.KindOf(err) != spec.KindAlreadyExists {
				return err
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Fatal(err)
	}
	if len(won) != 1 {
		t.Errorf("%d creators won the name", len(won))
	}
	all, _, err := m.List(Filter{}, 100, "")
	if err != nil || len(all) != 2 {
		t.Errorf("%d workloads, %v", len(all), err)
	}
}

func TestBadRequestsRecordNothing(t *testing.T) {
	h := newHost(t)
	var err error
	if h.policy, err = policy.Load([]byte("version: 1\ndefault: deny\n"), "policy.yaml"); err != nil {
		t.Fatal(err)
	}
	m := h.boot()
	_, err = m.Create(h.ctx(), CreateOptions{Spec: spec.Workload{Image: "busybox", Isolation: spec.IsolationContainer}})
	if spec.KindOf(err) != spec.KindDenied {
		t.Errorf("denied by policy: %v", err)
	}
	_, err = m.Create(h.ctx(), CreateOptions{Spec: spec.Workload{Image: "nosuch", Isolation: spec.IsolationContainer}})
	if spec.KindOf(err) != spec.KindNotFound {
		t.Errorf("unknown image: %v", err)
	}
	if all, _, _ := m.List(Filter{}, 10, ""); len(all) != 0 {
		t.Errorf("recorded: %v", all)
	}
}

func TestListPages(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	var want []string
	for i := range 7 {
		w, err := m.Create(h.ctx(), CreateOptions{
			Labels: map[string]string{"n": fmt.Sprint(i % 2)},
			Spec:   spec.Workload{Image: "busybox", Isolation: spec.IsolationContainer},
		})
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, w.ID)
	}
	var got []string
	for token, pages := "", 0; ; pages++ {
		ws, next, err := m.List(Filter{}, 3, token)
		if err != nil || pages > 3 {
			t.Fatal(err, pages)
		}
		for _, w := range ws {
			got = append(got, w.ID)
		}
		if token = next; token == "" {
			break
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("pages give %v, want %v", got, want)
	}
	odd, _, _ := m.List(Filter{Labels: map[string]string{"n": "1"}}, 10, "")
	running, _, _ := m.List(Filter{States: []State{StateRunning}}, 10, "")
	if len(odd) != 3 || len(running) != 0 {
		t.Errorf("%d with label, %d running", len(odd), len(running))
	}
}

func TestExecIsApartFromTheWorkload(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.start(m, "echo main; exec sleep 1000")
	s, err := m.Exec(h.ctx(), id, spec.Process{Command: []string{"/bin/sh", "-c", "cat; echo e >&2; exit 6"}, Stdin: true})
	if err != nil {
		t.Fatal(err)
	}
	input := strings.Repeat("0123456789abcdef", 100000)
	var written sync.WaitGroup
	written.Go(func() {
		if err := s.Write(h.ctx(), []byte(input)); err != nil {
			t.Error(err)
		}
		if err := s.CloseStdin(h.ctx()); err != nil {
			t.Error(err)
		}
	})
	var out, errs strings.Builder
	if err := s.Output(h.ctx(), func(st Stream, b []byte) error {
		if st == Stderr {
			errs.Write(b)
		} else {
			out.Write(b)
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	written.Wait() // the process may have ended before the answer to the last of it came
	x, err := s.Wait(h.ctx())
	if err != nil || x.Code != 6 || out.String() != input || errs.String() != "e\n" {
		t.Errorf("exit %+v, %d bytes out, stderr %q, %v", x, out.Len(), errs.String(), err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if strings.Contains(h.logs(m, id), "0123") {
		t.Error("an exec's output is in the workload's logs")
	}
}

func TestClosingASessionEndsItsProcess(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.start(m, "exec sleep 1000")
	s, err := m.Exec(h.ctx(), id, spec.Process{Command: []string{"sleep", "1000"}})
	if err != nil {
		t.Fatal(err)
	}
	pid := s.PID()
	if !runs(t, pid) {
		t.Fatalf("process %d does not run", pid)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if runs(t, pid) {
		t.Errorf("process %d runs on", pid)
	}
}

// runs reports whether there is a process that has not ended: the fake's agent reaps at its own end.
func runs(t *testing.T, pid int) bool {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ESRCH) {
		t.Fatal(err)
	}
	return err == nil && !strings.Contains(string(b), ") Z ")
}

// The workload's end ends what was exec'd into it, and its callers hear of it.
func TestExecEndsWithItsWorkload(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.start(m, "read x; exit 0")
	s, err := m.Exec(h.ctx(), id, spec.Process{Command: []string{"sleep", "1000"}})
	if err != nil {
		t.Fatal(err)
	}
	a, err := m.Attach(h.ctx(), id, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Write(h.ctx(), []byte("go\n")); err != nil {
		t.Fatal(err)
	}
	if x, err := s.Wait(h.ctx()); err != nil || x.Code != 137 {
		t.Errorf("exec: %+v, %v", x, err)
	}
	if err := s.Close(); err != nil {
		t.Errorf("close: %v", err)
	}
	if x, err := a.Wait(h.ctx()); err != nil || x.Code != 0 {
		t.Errorf("attachment: %+v, %v", x, err)
	}
}

func TestAttachBeforeStartMissesNothing(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.create(m, "cat; echo done")
	a, err := m.Attach(h.ctx(), id, true)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan string, 1)
	go func() {
		var b strings.Builder
		if err := a.Output(h.ctx(), func(_ Stream, p []byte) error { b.Write(p); return nil }); err != nil {
			t.Error(err)
		}
		done <- b.String()
	}()
	if _, err := m.Start(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	if err := a.Write(h.ctx(), []byte("in ")); err != nil {
		t.Fatal(err)
	}
	if err := a.CloseStdin(h.ctx()); err != nil {
		t.Fatal(err)
	}
	if got := <-done; got != "in done\n" {
		t.Errorf("attachment saw %q", got)
	}
	if err := a.Write(h.ctx(), []byte("late")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("a late write says %v", err)
	}
}

func TestEventsTellTheStory(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	since := time.Now()
	id := h.start(m, "exit 2")
	h.wait(m, id)
	if err := m.Delete(h.ctx(), id, false); err != nil {
		t.Fatal(err)
	}
	var got []string
	stop := errors.New("stop")
	if err := m.Watch(h.ctx(), "", since, func(e Event) error {
		got = append(got, string(e.Type)+e.Attributes["exit_code"])
		if e.Type == EventDeleted {
			return stop
		}
		return nil
	}); !errors.Is(err, stop) {
		t.Fatal(err)
	}
	want := "created starting started stopping exited2 deleted"
	if strings.Join(got, " ") != want {
		t.Errorf("events %v, want %s", got, want)
	}
}
