package workload

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// A daemon that goes away and comes back, here by closing the manager, which touches no sandbox, and opening another.
func TestRestartLosesNothing(t *testing.T) {
	h := newHost(t)
	m := h.open()
	running := h.start(m, "i=0; while [ $i -lt 2000 ]; do echo $i; i=$((i+1)); done; read x; exit 5")
	created := h.create(m, "true")
	exited := h.start(m, "exit 8")
	h.wait(m, exited)
	h.awaitOutput(m, running, "7\n")
	for range 3 {
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		m = h.open()
	}
	defer m.Close()
	if w, err := m.Get(created); err != nil || w.Status.State != StateCreated {
		t.Errorf("created: %+v, %v", w.Status, err)
	}
	if w, err := m.Get(exited); err != nil || w.Status.State != StateExited || w.Status.Exit.Code != 8 {
		t.Errorf("exited: %+v, %v", w.Status, err)
	}
	a, err := m.Attach(h.ctx(), running, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Write(h.ctx(), []byte("end\n")); err != nil {
		t.Fatal(err)
	}
	if w := h.wait(m, running); w.Status.Exit == nil || w.Status.Exit.Code != 5 {
		t.Errorf("running: %+v", w.Status)
	}
	var want strings.Builder
	for i := range 2000 {
		fmt.Fprintln(&want, i)
	}
	if got := h.logs(m, running); got != want.String() {
		t.Errorf("logs have %d bytes, want %d: output was lost or repeated", len(got), want.Len())
	}
}

// A process that ends while there is no daemon keeps its exit code and its output.
func TestEndBetweenDaemons(t *testing.T) {
	h := newHost(t)
	m := h.open()
	flag := filepath.Join(h.dir, "flag")
	id := h.start(m, fmt.Sprintf("echo up; until [ -e %s ]; do sleep 0.01; done; echo last words; exit 11", flag))
	h.awaitOutput(m, id, "up")
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(flag, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m = h.boot()
	if w := h.wait(m, id); w.Status.State != StateExited || w.Status.Exit.Code != 11 {
		t.Errorf("ended as %+v", w.Status)
	}
	if got := h.logs(m, id); got != "up\nlast words\n" {
		t.Errorf("logs are %q", got)
	}
}

// A caller whose daemon died is gone, and so must be what it had exec'd.
func TestRestartEndsExecs(t *testing.T) {
	h := newHost(t)
	m := h.open()
	id := h.start(m, "exec sleep 1000")
	s, err := m.Exec(h.ctx(), id, spec.Process{Command: []string{"sleep", "1000"}})
	if err != nil {
		t.Fatal(err)
	}
	pidfd, err := unix.PidfdOpen(s.PID(), 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pidfd)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = h.boot()
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(waitLimit.Milliseconds()))
	if n != 1 || err != nil {
		t.Errorf("the exec'd process runs on: %v", err)
	}
	if w, err := m.Get(id); err != nil || w.Status.State != StateRunning {
		t.Errorf("the workload itself: %+v, %v", w.Status, err)
	}
}

// The states a daemon can leave behind by dying between a record and the deed.
func TestRecoverFromEachState(t *testing.T) {
	for _, tt := range []struct {
		state State
		exit  *spec.Exit
		want  State // "" for no record
	}{
		{StateCreated, nil, StateCreated},
		{StateStarting, nil, StateFailed},
		{StateRunning, nil, StateFailed},
		{StateStopping, nil, StateFailed},
		{StateStopping, &spec.Exit{Code: 6}, StateExited},
		{StateExited, &spec.Exit{Code: 6}, StateExited},
		{StateFailed, nil, StateFailed},
		{StateDeleting, nil, ""},
	} {
		t.Run(fmt.Sprintf("%s exit %v", tt.state, tt.exit != nil), func(t *testing.T) {
			h := newHost(t)
			m := h.open()
			id := h.create(m, "true")
			e, err := m.find(id)
			if err != nil {
				t.Fatal(err)
			}
			if err := e.setState(tt.state, func(r *record) { r.Run, r.Status.Exit = 1, tt.exit }); err != nil {
				t.Fatal(err)
			}
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
			m = h.boot()
			w, err := m.Get(id)
			if tt.want == "" {
				if spec.KindOf(err) != spec.KindNotFound {
					t.Errorf("still there: %+v, %v", w.Status, err)
				}
				return
			}
			if err != nil || w.Status.State != tt.want || (tt.want == StateExited) != (w.Status.Exit != nil) {
				t.Errorf("recovered as %+v, %v", w.Status, err)
			}
			if tt.want == StateFailed && tt.state != StateFailed && w.Status.Message == "" {
				t.Error("failed without a reason")
			}
		})
	}
}

// A sandbox whose walls stood, but whose process had not started, is undone; one whose process had started is kept.
func TestRecoverHalfStarted(t *testing.T) {
	h := newHost(t)
	m := h.open()
	half := h.create(m, "exec sleep 1000")
	h.rt.dialError = errors.New("killed here")
	whole := h.create(m, "echo up; read x; exit 3")
	e, err := m.find(half)
	if err != nil {
		t.Fatal(err)
	}
	// The walls alone, and the record that was written before them.
	if err := e.setState(StateStarting, func(r *record) { r.Run = 1 }); err != nil {
		t.Fatal(err)
	}
	w := e.workload()
	if _, err := h.rt.Runtime.Start(h.ctx(), spec.Sandbox{ID: half, ImagePath: h.images["busybox"].Path, Resources: w.Spec.Resources}); err != nil {
		t.Fatal(err)
	}
	h.rt.dialError = nil
	if _, err := m.Start(h.ctx(), whole); err != nil {
		t.Fatal(err)
	}
	h.awaitOutput(m, whole, "up")
	e, err = m.find(whole)
	if err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	// As if the daemon had died just before it recorded that the process runs.
	st, err := openStore(filepath.Join(h.dir, "state/workloads"))
	if err != nil {
		t.Fatal(err)
	}
	rec := e.rec
	rec.Status.State = StateStarting
	if _, err := st.put(&rec); err != nil {
		t.Fatal(err)
	}
	if err := st.close(); err != nil {
		t.Fatal(err)
	}

	m = h.boot()
	if w, err := m.Get(half); err != nil || w.Status.State != StateFailed {
		t.Errorf("half: %+v, %v", w.Status, err)
	}
	if w, err := m.Get(whole); err != nil || w.Status.State != StateRunning {
		t.Fatalf("whole: %+v, %v", w.Status, err)
	}
	a, err := m.Attach(h.ctx(), whole, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Write(h.ctx(), []byte("x\n")); err != nil {
		t.Fatal(err)
	}
	if w := h.wait(m, whole); w.Status.Exit == nil || w.Status.Exit.Code != 3 {
		t.Errorf("whole: %+v", w.Status)
	}
}

func TestRecoverRemovesStrays(t *testing.T) {
	h := newHost(t)
	stray := strings.Repeat("5", 32)
	if _, err := h.rt.Runtime.Start(h.ctx(), spec.Sandbox{ID: stray, ImagePath: h.images["busybox"].Path, Resources: DefaultResources}); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(h.dir, "state/workloads", stray)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	h.boot()
	if left := h.sandboxes(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if _, err := os.Stat(dir); !os.IsNotExist(err) {
		t.Errorf("stray output is still there: %v", err)
	}
}

func TestStateOfAnotherVersionIsRefused(t *testing.T) {
	h := newHost(t)
	m := h.open()
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(h.dir, "state/workloads")
	f, err := os.OpenFile(filepath.Join(dir, journalFile), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte("sandboxd workloads 9\n"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := openStore(dir); err == nil || !strings.Contains(err.Error(), "workloads 9") {
		t.Errorf("a store of version 9 opens with %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, formerFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := openStore(dir); err == nil || !strings.Contains(err.Error(), formerFile) {
		t.Errorf("a store of an earlier sandboxd opens with %v", err)
	}
}
