package workload

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// A workload is lost when the journal's damage took all of its record: nobody knows its name, its owner or its isolation, and
// what it left on the host stays until somebody has looked at it.

// lost names everything on the host that bears an id and no record. What cannot be listed is warned of.
func (m *Manager) lost(ctx context.Context, warn func(what, id string, err error)) []string {
	ids := map[string]bool{}
	add := func(what string, found []string, err error) {
		if err != nil {
			warn(what, "", err)
		}
		for _, id := range found {
			ids[id] = true
		}
	}
	for isolation, rt := range m.cfg.Runtimes {
		found, err := rt.List(ctx)
		add(string(isolation)+" sandboxes", found, err)
	}
	joined, err := m.cfg.Networks.List()
	add("joined networks", joined, err)
	var dirs []string
	entries, err := os.ReadDir(m.dir)
	for _, e := range entries {
		if e.IsDir() {
			dirs = append(dirs, e.Name())
		}
	}
	add("output", dirs, err)
	m.mu.Lock()
	defer m.mu.Unlock()
	for id := range m.byID { // also those that are just being created
		delete(ids, id)
	}
	return slices.Sorted(maps.Keys(ids))
}

// removeLost removes everything that bears the id of a lost workload; notFound if there is nothing, or if no record was lost. It
// is idempotent, and what a daemon that dies leaves of it is as lost as before.
func (m *Manager) removeLost(ctx context.Context, id string, notFound error) error {
	copies, err := m.store.damaged()
	if err != nil {
		return fmt.Errorf("cannot look for damaged records: %w", err)
	}
	if len(copies) == 0 {
		return notFound
	}
	warn := func(what, id string, err error) {
		m.cfg.Log.Error("cannot list "+what, zap.String("id", id), zap.Error(err))
	}
	if !slices.Contains(m.lost(ctx, warn), id) {
		return notFound
	}
	result := make(chan error, 1)
	m.owned.Go(func() { result <- m.removeLostHeld(id) })
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// removeLostHeld goes on without its caller.
func (m *Manager) removeLostHeld(id string) error {
	ctx, cancel := context.WithTimeout(context.Background(), releaseLimit)
	defer cancel()
	m.cfg.Log.Warn("removing what is left of a workload whose record was lost", zap.String("id", id))
	for isolation, rt := range m.cfg.Runtimes {
		if err := rt.Remove(ctx, id); err != nil {
			return spec.Errorf(spec.KindUnavailable, "cannot remove the %s of lost workload %s: try again: %w", isolation, id, err)
		}
	}
	if err := m.cfg.Networks.Detach(ctx, id); err != nil {
		return spec.Errorf(spec.KindUnavailable, "cannot have lost workload %s leave its network: try again: %w", id, err)
	}
	if err := os.RemoveAll(filepath.Join(m.dir, id)); err != nil {
		return fmt.Errorf("cannot remove output of lost workload %s: %w", id, err)
	}
	return nil
}
