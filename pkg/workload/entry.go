package workload

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// entry is a workload in the daemon's memory.
type entry struct {
	m *Manager
	// Fixed.
	id, name, digest string
	created          time.Time
	caller           string // its key
	once             *once
	onceID           onceID
	// Whether its record is on the disk: until then it only keeps its name and its image. Guarded by Manager.mu.
	ready bool
	// Held by the verb that is building or taking down the workload's walls.
	op chan struct{}
	// Somebody tries again to finish its removal: keepRemoving.
	removing atomic.Bool

	mu  sync.Mutex // guards what follows
	rec record
	// In STARTING (once the walls stand), RUNNING, PAUSED and STOPPING; nil while the sandbox of an earlier daemon cannot be had
	// back, and then unreachable says why.
	run         *run
	unreachable error
	// Closed and replaced at each change of state.
	changed chan struct{}
	// The last change of the record, for store.sync.
	change uint64
	// Calls off the start that is under way, or was.
	cancelStart context.CancelCauseFunc

	logMu sync.Mutex // guards log; taken before mu
	log   *outputLog
}

// run is one life of a workload's process, from the standing of its walls to their removal.
type run struct {
	inst   runtime.Instance
	client *agent.Client
	proc   *agent.Process

	stdinMu sync.Mutex // guards stdin: attached callers take turns
	stdin   stdin

	stillMu sync.Mutex // held to freeze or thaw; guards what follows
	// Its process has ended: it is not frozen any more.
	ended bool
	// Processes of an earlier daemon's callers are to be ended when it goes on.
	retain bool
}

// containerID names the one container of a sandbox to its agent.
const containerID = "main"

func newEntry(m *Manager, r *record) *entry {
	e := &entry{
		m: m, id: r.ID, name: r.Name, digest: r.Status.ImageDigest, created: r.CreatedAt, once: r.Once, caller: r.Caller.Key(),
		op: make(chan struct{}, 1), rec: *r, changed: make(chan struct{}),
	}
	if e.once != nil {
		e.onceID = onceID{r.Caller.Key(), e.once.Key}
	}
	return e
}

// pageKey orders workloads by age.
func (e *entry) pageKey() string {
	return fmt.Sprintf("%020d-%s", e.created.UnixNano(), e.id)
}

func (e *entry) dir() string { return filepath.Join(e.m.dir, e.id) }

func (e *entry) runtime() runtime.Runtime { return e.m.cfg.Runtimes[e.isolation()] }

func (e *entry) isolation() spec.Isolation {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.rec.Status.Isolation
}

// runProcess names the process of the n-th start to the agent.
func runProcess(n int) string { return "run-" + strconv.Itoa(n) }

// workload answers with a copy.
func (e *entry) workload() Workload {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.rec.workload()
}

// workload is what callers see of it.
func (r *record) workload() Workload {
	w := r.Workload
	w.Owner = r.Caller
	w.Labels = maps.Clone(w.Labels)
	w.Spec.Mounts = slices.Clone(w.Spec.Mounts)
	if w.Status.Exit != nil {
		exit := *w.Status.Exit
		w.Status.Exit = &exit
	}
	if w.Status.OOM != nil {
		oom := *w.Status.OOM
		w.Status.OOM = &oom
	}
	return w
}

// peek answers with the state and a channel that is closed when it changes.
func (e *entry) peek() (record, *run, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.rec, e.run, e.changed
}

func terminal(s State) bool { return s == StateExited || s == StateFailed }

// setState assigns a state whatever the state was; the caller holds entry.op or is the run's supervisor.
func (e *entry) setState(s State, change func(*record)) error {
	return e.moveState(func(record) bool { return true }, s, change)
}

var errMoved = errors.New("the workload is in another state by now")

// moveState is the only place where a workload's state is assigned, if it is still one that from accepts; errMoved if
// not. change edits a copy of the record. The record is written before anyone sees it, so that no death of the daemon loses
// it; what must outlive the host's own death is also synced, by whoever is about to act upon it (entry.sync).
func (e *entry) moveState(from func(record) bool, s State, change func(*record)) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !from(e.rec) {
		return errMoved
	}
	next := e.rec
	next.assign(s, change)
	fault.At("record", "before "+string(s))
	end := phase.Begin(e.id, "record "+string(s))
	written, err := e.m.store.put(&next)
	end()
	fault.At("record", string(s))
	if err != nil {
		return err
	}
	e.change = written
	before := e.rec.Status.State
	next.config = nil // stored
	e.rec = next
	close(e.changed)
	e.changed = make(chan struct{})
	if before != s {
		e.announceChangeLocked(before)
	}
	return nil
}

// sync waits until the record, as it was written last, is on the disk.
func (e *entry) sync() error {
	defer phase.Begin(e.id, "record synced")()
	e.mu.Lock()
	change := e.change
	e.mu.Unlock()
	err := e.m.store.sync(change)
	fault.At("record", "synced")
	return err
}

// logUnsynced is for what has happened, on the disk or not.
func (e *entry) logUnsynced(err error) {
	if err != nil {
		e.m.cfg.Log.Error("cannot bring state to the disk; it would not outlive the host's death", zap.String("workload", e.id), zap.Error(err))
	}
}

// syncBeside is sync while its caller does something else; the result waits for it.
func (e *entry) syncBeside() (wait func() error) {
	result := make(chan error, 1)
	e.m.owned.Go(func() { result <- e.sync() })
	return func() error { return <-result }
}

// assign edits a record that nobody else sees, or under the lock. Who has ended is joined to nothing.
func (r *record) assign(s State, change func(*record)) {
	r.Status.State = s
	if terminal(s) || s == StateDeleting {
		r.Status.Networks = nil
	}
	if change != nil {
		change(r)
	}
}

// mustState is setState where the daemon cannot go back: what happened has happened, recorded or not.
func (e *entry) mustState(s State, change func(*record)) {
	if err := e.setState(s, change); err != nil {
		e.m.cfg.Log.Error("cannot record state; after a restart it will be found again",
			zap.String("workload", e.id), zap.String("state", string(s)), zap.Error(err))
		e.mu.Lock()
		defer e.mu.Unlock()
		e.rec.assign(s, change)
		close(e.changed)
		e.changed = make(chan struct{})
		e.announceLocked()
	}
}

func (e *entry) setRun(r *run) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.run, e.unreachable = r, nil
}

// kill ends the sandbox of a run, if it is still that run's.
func (e *entry) kill(r *run) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.run != r {
		return nil
	}
	return r.inst.Kill()
}

// stateEvents says which event announces a state; DELETING has none, the end of it has.
var stateEvents = map[State]EventType{
	StateCreated:  EventCreated,
	StateStarting: EventStarting,
	StateRunning:  EventStarted,
	StatePaused:   EventPaused,
	StateStopping: EventStopping,
	StateExited:   EventExited,
	StateFailed:   EventFailed,
}

// announceChangeLocked announces a state, and that a workload runs again differently from that it runs.
func (e *entry) announceChangeLocked(before State) {
	if before == StatePaused && e.rec.Status.State == StateRunning {
		e.m.events.publish(e.eventLocked(EventResumed))
		return
	}
	e.announceLocked()
}

func (e *entry) announceLocked() {
	t, ok := stateEvents[e.rec.Status.State]
	if !ok {
		return
	}
	e.m.events.publish(e.eventLocked(t))
}

func (e *entry) announce(t EventType, attributes map[string]string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	ev := e.eventLocked(t)
	maps.Copy(ev.Attributes, attributes)
	e.m.events.publish(ev)
}

func (e *entry) eventLocked(t EventType) Event {
	st := e.rec.Status
	a := map[string]string{
		"image":  e.rec.Spec.Image,
		"rule":   st.Decision.Rule,
		"reason": st.Decision.Reason,
	}
	if t == EventStarted {
		maps.Copy(a, startedHow(st))
	}
	if t == EventExited && st.Exit != nil {
		a["exit_code"] = strconv.Itoa(st.Exit.Code)
	}
	return Event{
		Time: time.Now(), Type: t, WorkloadID: e.id, WorkloadName: e.name,
		Isolation: st.Isolation, Message: st.Message, Attributes: a,
		Labels: e.rec.Labels, Owner: e.rec.Caller,
	}
}

// lock takes the workload for a verb that builds or takes down its walls.
func (e *entry) lock(ctx context.Context) error {
	select {
	case e.op <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-e.m.ctx.Done():
		return errClosing
	}
}

func (e *entry) unlock() { <-e.op }

// await returns when done says so of the record, which it does at the latest when the state changes.
func (e *entry) await(ctx context.Context, done func(record) bool) (record, error) {
	for {
		rec, _, changed := e.peek()
		if done(rec) {
			return rec, nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return rec, ctx.Err()
		case <-e.m.ctx.Done():
			return rec, errClosing
		}
	}
}

// output answers with the workload's log, opening it if need be.
func (e *entry) output() (*outputLog, error) {
	e.logMu.Lock()
	defer e.logMu.Unlock()
	if rec, _, _ := e.peek(); rec.Status.State == StateDeleting {
		return nil, e.gone()
	}
	if e.log == nil {
		if err := os.MkdirAll(e.dir(), 0o700); err != nil {
			return nil, fmt.Errorf("cannot make workload directory: %w", err)
		}
		e.mu.Lock()
		limit := e.rec.Spec.Resources.LogBytes
		e.mu.Unlock()
		l, err := openOutputLog(e.dir(), limit)
		if err != nil {
			return nil, err
		}
		e.log = l
	}
	return e.log, nil
}

func (e *entry) closeLog() {
	e.logMu.Lock()
	defer e.logMu.Unlock()
	if e.log != nil {
		e.log.close()
	}
}

// logError says what it means that a log was closed under its reader.
func (e *entry) logError(err error) error {
	switch {
	case !errors.Is(err, os.ErrClosed):
		return err
	case e.m.ctx.Err() != nil:
		return errClosing
	default:
		return e.gone()
	}
}

func (e *entry) gone() error {
	return spec.Errorf(spec.KindNotFound, "no workload %q: it is being deleted", e.name)
}

// running answers with the life of a running workload; KindWrongState says which state it is in otherwise.
func (e *entry) running() (*run, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.rec.Status.State != StateRunning {
		return nil, e.wrongStateLocked("running")
	}
	if e.run == nil {
		return nil, e.unreachableLocked()
	}
	return e.run, nil
}

func (e *entry) unreachableLocked() error {
	return spec.Errorf(spec.KindUnavailable, "workload %q runs, but sandboxd cannot reach its sandbox yet: %w", e.name, e.unreachable)
}

func (e *entry) wrongStateLocked(need string) error {
	if e.rec.Status.State == StatePaused {
		return spec.Errorf(spec.KindWrongState, "workload %q is paused, not %s: `sandboxctl resume` lets it go on", e.name, need)
	}
	return spec.Errorf(spec.KindWrongState, "workload %q is %s, not %s", e.name, e.rec.Status.State, need)
}
