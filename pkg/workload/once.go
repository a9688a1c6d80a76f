package workload

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// once is what a creation with an idempotency key leaves in its record, so that a retry finds the workload of the first try: while
// that is under way, afterwards, and after a restart of the daemon. It lives as long as the workload, so there are no more
// of them than workloads.
type once struct {
	Key string `json:"key"`
	// Of the request as it was made.
	SHA256 string `json:"sha256"`
}

// onceID tells keys apart: each caller has its own.
type onceID struct{ caller, key string }

func (o CreateOptions) once() (*once, error) {
	if o.Key == "" {
		return nil, nil
	}
	if o.from != "" {
		o.Spec = spec.Workload{Hostname: o.Spec.Hostname} // what it is made of has the rest, which may change
	}
	// Maps are encoded in the order of their keys.
	b, err := json.Marshal(struct {
		Name            string
		Labels          map[string]string
		Spec            spec.Workload
		RemoveWhenEnded bool   `json:",omitempty"`
		From            string `json:",omitempty"`
	}{o.Name, o.Labels, o.Spec, o.RemoveWhenEnded, o.from})
	if err != nil {
		return nil, fmt.Errorf("cannot encode the request: %w", err)
	}
	sum := sha256.Sum256(b)
	return &once{Key: o.Key, SHA256: hex.EncodeToString(sum[:])}, nil
}

// createOnce answers with the workload that the key stands for, or creates it. Of several tries at once one does, and the
// others wait for it.
func (m *Manager) createOnce(ctx context.Context, o CreateOptions) (Workload, error) {
	asked, err := o.once()
	if err != nil {
		return Workload{}, err
	}
	id := onceID{o.Caller.Key(), o.Key}
	for {
		e, busy := m.takeKey(id)
		switch {
		case e != nil:
			return e.again(asked)
		case busy != nil:
			select {
			case <-busy:
				continue
			case <-ctx.Done():
				return Workload{}, ctx.Err()
			case <-m.ctx.Done():
				return Workload{}, errClosing
			}
		}
		defer m.releaseKey(id)
		return m.create(o, asked)
	}
}

// takeKey answers with the workload of a key; else with a channel that is closed when the try that has it is over; else
// the key is the caller's, until releaseKey.
func (m *Manager) takeKey(id onceID) (*entry, <-chan struct{}) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if busy, ok := m.creating[id]; ok {
		return nil, busy
	}
	if e := m.byKey[id]; e != nil {
		return e, nil
	}
	m.creating[id] = make(chan struct{})
	return nil, nil
}

func (m *Manager) releaseKey(id onceID) {
	m.mu.Lock()
	defer m.mu.Unlock()
	close(m.creating[id])
	delete(m.creating, id)
}

// again is the answer to a retry: the workload as it is now.
func (e *entry) again(asked *once) (Workload, error) {
	if *e.once != *asked {
		return Workload{}, spec.Invalidf("idempotency_key", "the idempotency key %q made workload %s from another request: a retry must ask for the same; use a new key for something else", asked.Key, e.id[:12])
	}
	return e.workload(), nil
}
