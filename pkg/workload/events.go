package workload

import (
	"context"
	"sync"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// EventType says what happened.
type EventType string

const (
	EventCreated      EventType = "created"
	EventStarting     EventType = "starting"
	EventStarted      EventType = "started"
	EventStopping     EventType = "stopping"
	EventExited       EventType = "exited"
	EventFailed       EventType = "failed"
	EventDeleted      EventType = "deleted"
	EventExecStarted  EventType = "exec-started"
	EventExecExited   EventType = "exec-exited"
	EventRecovered    EventType = "recovered"
	EventPaused       EventType = "paused"
	EventResumed      EventType = "resumed"
	EventUpdated      EventType = "updated"
	EventImageAdded   EventType = "image-added"
	EventImageRemoved EventType = "image-removed"
)

// Event is something that happened to a workload or an image.
type Event struct {
	Time         time.Time
	Type         EventType
	WorkloadID   string
	WorkloadName string
	Isolation    spec.Isolation
	Message      string
	Attributes   map[string]string
	// The workload's, and who created it: they say who may see the event. Not to be changed.
	Labels map[string]string
	Owner  spec.Caller
}

// eventsKept is how many past events a daemon remembers, and how far a watcher may fall behind.
const eventsKept = 4096

// eventRing keeps the last events. Watchers read at their own pace and cost the publisher nothing.
type eventRing struct {
	mu      sync.Mutex // guards what follows
	ring    [eventsKept]Event
	next    uint64 // number of the next event
	changed chan struct{}
}

func newEventRing() *eventRing { return &eventRing{changed: make(chan struct{})} }

func (r *eventRing) publish(e Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.ring[r.next%eventsKept] = e
	r.next++
	close(r.changed)
	r.changed = make(chan struct{})
}

// from answers with the events numbered n and later, the number after them, and a channel that is closed when there are more.
func (r *eventRing) from(n uint64) ([]Event, uint64, <-chan struct{}, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	oldest := r.next - min(r.next, eventsKept)
	lost := n < oldest
	var out []Event
	for i := max(n, oldest); i < r.next; i++ {
		out = append(out, r.ring[i%eventsKept])
	}
	return out, r.next, r.changed, lost
}

func (r *eventRing) end() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.next
}

// Watch calls fn with each event, the past ones from since on first (unless zero), until ctx is done or fn fails.
// ref, when not empty, selects one workload. A watcher that falls too far behind gets KindExhausted.
func (m *Manager) Watch(ctx context.Context, ref string, since time.Time, fn func(Event) error) error {
	id := ""
	if ref != "" {
		e, err := m.find(ref)
		if err != nil {
			return err
		}
		id = e.id
	}
	n := m.events.end()
	if !since.IsZero() {
		n = 0
	}
	for first := true; ; first = false {
		events, next, changed, lost := m.events.from(n)
		if lost && !first {
			return spec.Errorf(spec.KindExhausted, "cannot go on watching: this watcher fell more than %d events behind; watch again", eventsKept)
		}
		for _, e := range events {
			if id != "" && e.WorkloadID != id || e.Time.Before(since) {
				continue
			}
			if err := fn(e); err != nil {
				return err
			}
		}
		n = next
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-m.ctx.Done():
			return errClosing
		case <-changed:
		}
	}
}

// Announce publishes an event that happened outside the manager.
func (m *Manager) Announce(e Event) {
	if e.Time.IsZero() {
		e.Time = time.Now()
	}
	m.events.publish(e)
}
