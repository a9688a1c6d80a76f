package workload

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Verbs of many callers on one workload, in any order, must neither hang nor leave it in a state that cannot be left.
func TestVerbsRace(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	for range 15 {
		id := h.create(m, "exec sleep 1000")
		var g errgroup.Group
		for _, verb := range []func() error{
			func() error { _, err := m.Start(h.ctx(), id); return err },
			func() error { _, err := m.Stop(h.ctx(), id, 0); return err },
			func() error { _, err := m.Stop(h.ctx(), id, time.Minute); return err },
			func() error { _, err := m.Start(h.ctx(), id); return err },
			func() error { return m.Kill(h.ctx(), id, "") },
			func() error { return m.Delete(h.ctx(), id, true) },
		} {
			g.Go(func() error {
				err := verb()
				switch spec.KindOf(err) {
				case spec.KindWrongState, spec.KindNotFound, spec.KindUnavailable:
					return nil
				}
				return err
			})
		}
		if err := g.Wait(); err != nil {
			t.Fatal(err)
		}
		if err := m.Delete(h.ctx(), id, true); err != nil && spec.KindOf(err) != spec.KindNotFound {
			t.Fatal(err)
		}
	}
	if left := h.sandboxes(); len(left) > 0 {
		t.Errorf("left on the host: %v", left)
	}
}

// A start is called off from its first moment on, and says why.
func TestStopCallsOffAStart(t *testing.T) {
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
	if _, err := m.Stop(h.ctx(), id, time.Minute); err != nil {
		t.Fatal(err)
	}
	if err := <-started; spec.KindOf(err) != spec.KindWrongState || !strings.Contains(err.Error(), "stopped while it was starting") {
		t.Errorf("the start says %v", err)
	}
	if w, _ := m.Get(id); w.Status.State != StateFailed || !strings.Contains(w.Status.Message, "stopped while it was starting") {
		t.Errorf("status %+v", w.Status)
	}
}

// A caller that goes away in the grace period does not call the stop off.
func TestStopOutlivesItsCaller(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.start(m, "trap '' TERM; echo up; while :; do sleep 0.05; done")
	h.awaitOutput(m, id, "up")
	ctx, cancel := context.WithCancel(h.ctx())
	go func() {
		e, err := m.find(id)
		if err == nil {
			_, err = e.await(h.ctx(), func(r record) bool { return r.Status.State == StateStopping })
		}
		if err != nil {
			t.Error(err)
		}
		cancel()
	}()
	if _, err := m.Stop(ctx, id, 300*time.Millisecond); !errors.Is(err, context.Canceled) {
		t.Fatalf("stop says %v", err)
	}
	if w := h.wait(m, id); w.Status.Exit == nil || w.Status.Exit.Code != 137 {
		t.Errorf("ended as %+v", w.Status)
	}
}

func TestKillHurriesAStop(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.start(m, "trap '' TERM; echo up; while :; do sleep 0.05; done")
	h.awaitOutput(m, id, "up")
	stopped := make(chan error, 1)
	go func() {
		_, err := m.Stop(h.ctx(), id, time.Hour)
		stopped <- err
	}()
	e, err := m.find(id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.await(h.ctx(), func(r record) bool { return r.Status.State == StateStopping }); err != nil {
		t.Fatal(err)
	}
	if err := m.Kill(h.ctx(), id, "KILL"); err != nil {
		t.Fatal(err)
	}
	if err := <-stopped; err != nil {
		t.Error(err)
	}
}

// What one attachment had accepted before it was cut off must not swallow what the next one writes.
func TestSecondAttachmentLosesNoInput(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	flag := filepath.Join(h.dir, "flag")
	id := h.start(m, fmt.Sprintf("until [ -e %s ]; do sleep 0.01; done; read x; wc -c", flag))
	a, err := m.Attach(h.ctx(), id, true)
	if err != nil {
		t.Fatal(err)
	}
	first := strings.Repeat("a", 300000)
	ctx, cancel := context.WithTimeout(h.ctx(), 500*time.Millisecond)
	defer cancel()
	if err := a.Write(ctx, []byte(first)); err == nil {
		t.Fatal("a process that does not read took 300000 bytes")
	}
	e, err := m.find(id)
	if err != nil {
		t.Fatal(err)
	}
	_, r, _ := e.peek()
	taken, _, err := r.proc.WriteInput(h.ctx(), 0, nil, false)
	if err != nil || taken == 0 {
		t.Fatalf("the process was given %d bytes, %v: too few for this test", taken, err)
	}
	b, err := m.Attach(h.ctx(), id, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(flag, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := b.Write(h.ctx(), []byte("\n"+strings.Repeat("b", 140000))); err != nil {
		t.Fatal(err)
	}
	if err := b.CloseStdin(h.ctx()); err != nil {
		t.Fatal(err)
	}
	h.wait(m, id)
	if got := strings.TrimSpace(h.logs(m, id)); got != "140000" {
		t.Errorf("the process counted %s bytes after the first line, want 140000", got)
	}
}

// A workload whose record is not on the disk yet is nobody's to see.
func TestReservedNamesAreHidden(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	e := newEntry(m, &record{Workload: Workload{ID: strings.Repeat("c", 32), Name: "soon", Status: Status{ImageDigest: "sha256:x"}}})
	if err := m.reserve(e); err != nil {
		t.Fatal(err)
	}
	for _, ref := range []string{"soon", e.id, e.id[:8]} {
		if _, err := m.Get(ref); spec.KindOf(err) != spec.KindNotFound {
			t.Errorf("Get(%q) says %v", ref, err)
		}
	}
	if all, _, _ := m.List(Filter{}, 10, ""); len(all) != 0 {
		t.Errorf("listed: %v", all)
	}
	if !m.ImageInUse("sha256:x") {
		t.Error("its image could be removed")
	}
	_, err := m.Create(h.ctx(), CreateOptions{Name: "soon", Spec: spec.Workload{Image: "busybox", Isolation: spec.IsolationContainer}})
	if spec.KindOf(err) != spec.KindAlreadyExists {
		t.Errorf("its name was given away: %v", err)
	}
}

// The policy sees the request as it was made, in Create and in Explain alike.
func TestPolicySeesTheRequestAsMade(t *testing.T) {
	h := newHost(t)
	var err error
	h.policy, err = policy.Load([]byte(`version: 1
default: deny
rules:
- {name: asked, when: 'request.name == "" && request.resources.memoryBytes == 0', isolation: container, reason: as asked}
`), "policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	m := h.boot()
	o := CreateOptions{Spec: spec.Workload{Image: "busybox", Isolation: spec.IsolationContainer}}
	d, err := m.Explain(h.ctx(), o)
	if err != nil || d.Rule != "asked" {
		t.Errorf("explain: %+v, %v", d, err)
	}
	w, err := m.Create(h.ctx(), o)
	if err != nil || w.Status.Decision.Rule != "asked" || w.Spec.Resources != DefaultResources {
		t.Errorf("create: %+v, %v", w, err)
	}
}

func TestLogsOfADeletedWorkload(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.create(m, "true")
	seen := make(chan error, 1)
	ready := make(chan struct{})
	go func() {
		close(ready)
		seen <- m.Logs(h.ctx(), id, LogOptions{Tail: -1, Follow: true}, func(LogEntry) error { return nil })
	}()
	<-ready
	if err := m.Delete(h.ctx(), id, false); err != nil {
		t.Fatal(err)
	}
	if err := <-seen; err != nil && spec.KindOf(err) != spec.KindNotFound {
		t.Errorf("the follower hears %v", err)
	}
}

// One sandbox that resists must not keep the daemon from the others.
func TestRecoverGoesOn(t *testing.T) {
	h := newHost(t)
	m := h.open()
	bad := h.create(m, "true")
	good := h.start(m, "echo up; read x; exit 5")
	h.awaitOutput(m, good, "up")
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	h.rt.releaseError = map[string]error{bad: errors.New("device busy")}
	m = h.boot()
	if w, err := m.Get(good); err != nil || w.Status.State != StateRunning {
		t.Errorf("good: %+v, %v", w.Status, err)
	}
	if w, err := m.Get(bad); err != nil || w.Status.State != StateCreated {
		t.Errorf("bad: %+v, %v", w.Status, err)
	}
}

// A sandbox that cannot be had back at once may be running well: it is tried again, and can be removed meanwhile.
func TestRecoverTriesAgain(t *testing.T) {
	h := newHost(t)
	m := h.open()
	id := h.start(m, "echo up; read x; exit 5")
	other := h.start(m, "exec sleep 1000")
	h.awaitOutput(m, id, "up")
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	h.rt.setAttachError(errors.New("no vsock today"))
	m = h.boot()
	if w, err := m.Get(id); err != nil || w.Status.State != StateRunning {
		t.Fatalf("%+v, %v", w.Status, err)
	}
	if _, err := m.Exec(h.ctx(), id, spec.Process{Command: []string{"true"}}); spec.KindOf(err) != spec.KindUnavailable {
		t.Errorf("exec says %v", err)
	}
	if err := m.Delete(h.ctx(), other, true); err != nil {
		t.Errorf("force deletion says %v", err)
	}
	h.rt.setAttachError(nil)
	e, err := m.find(id)
	if err != nil {
		t.Fatal(err)
	}
	for {
		if _, err := e.running(); err == nil {
			break
		}
		_, _, changed, _ := m.events.from(m.events.end())
		if _, err := e.running(); err == nil {
			break
		}
		select {
		case <-changed:
		case <-h.ctx().Done():
			t.Fatal("it was not had back")
		}
	}
	a, err := m.Attach(h.ctx(), id, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := a.Write(h.ctx(), []byte("x\n")); err != nil {
		t.Fatal(err)
	}
	if w := h.wait(m, id); w.Status.Exit == nil || w.Status.Exit.Code != 5 {
		t.Errorf("ended as %+v", w.Status)
	}
}

// A daemon that is killed between the record of the exit and the end of the walls loses no exit code.
func TestRecordedExitSurvives(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.start(m, "exec sleep 1000")
	e, err := m.find(id)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.setState(StateStopping, func(r *record) { r.Status.Exit = &spec.Exit{Code: 7} }); err != nil {
		t.Fatal(err)
	}
	_, r, _ := e.peek()
	if err := e.kill(r); err != nil {
		t.Fatal(err)
	}
	if w := h.wait(m, id); w.Status.State != StateExited || w.Status.Exit.Code != 7 {
		t.Errorf("ended as %+v", w.Status)
	}
}
