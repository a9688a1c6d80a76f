package cgroup

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/containerd/cgroups/v3/cgroup1"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// freezeTimeout bounds the wait until every process stands still: only one in an uninterruptible sleep takes long.
	freezeTimeout = 10 * time.Second
	// freezePollMin and Max pace that wait; most groups stand still within a millisecond.
	freezePollMin = 100 * time.Microsecond
	freezePollMax = 10 * time.Millisecond
)

// Freeze makes every process of the group stand still, those it forks meanwhile included, and returns when they do. If
// they don't, they go on. Killing works all the same. Idempotent.
func (g *Group) Freeze(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, freezeTimeout)
	defer cancel()
	if err := g.h.freeze(g.path, true); err != nil {
		return fmt.Errorf("cannot freeze the cgroup %s: %w", g.path, err)
	}
	err := g.awaitFrozen(ctx)
	if err != nil {
		_ = g.h.freeze(g.path, false) // the first error counts
		return err
	}
	return nil
}

func (g *Group) awaitFrozen(ctx context.Context) error {
	for poll := freezePollMin; ; poll = min(2*poll, freezePollMax) {
		frozen, err := g.h.frozen(g.path)
		if err != nil {
			return fmt.Errorf("cannot freeze the cgroup %s: %w", g.path, err)
		}
		if frozen {
			return nil
		}
		select {
		case <-time.After(poll):
		case <-ctx.Done():
			return spec.Errorf(spec.KindUnavailable, "cannot freeze the cgroup %s: a process waits for the disk or the like and cannot be stopped now: try again", g.path)
		}
	}
}

// Frozen reports whether the group stands still.
func (g *Group) Frozen() (bool, error) { return g.h.frozen(g.path) }

// Thaw lets a frozen group go on. Idempotent.
func (g *Group) Thaw() error {
	if err := g.h.freeze(g.path, false); err != nil && !gone(err) {
		return fmt.Errorf("cannot thaw the cgroup %s: %w", g.path, err)
	}
	return nil
}

func freezeV2(dir string, on bool) error {
	value := "0"
	if on {
		value = "1"
	}
	return writeFile(filepath.Join(dir, "cgroup.freeze"), value)
}

func frozenV2(dir string) (bool, error) {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
	return strings.Contains(string(b), "frozen 1"), err
}

func (v2) freeze(path string, on bool) error { return freezeV2(filepath.Join(root, path), on) }
func (v2) frozen(path string) (bool, error)  { return frozenV2(filepath.Join(root, path)) }
func (v1) freezerState(path string) string {
	return filepath.Join(root, string(cgroup1.Freezer), path, "freezer.state")
}
func (v v1) frozen(path string) (bool, error) {
	if v.unified {
		return frozenV2(filepath.Join(unifiedMount, path))
	}
	b, err := os.ReadFile(v.freezerState(path))
	return strings.TrimSpace(string(b)) == "FROZEN", err
}

// freeze prefers the cgroup2 mount beside v1: what it holds still can be killed, and what v1's freezer does cannot.
func (v v1) freeze(path string, on bool) error {
	if v.unified {
		return freezeV2(filepath.Join(unifiedMount, path), on)
	}
	value := "THAWED"
	if on {
		value = "FROZEN"
	}
	return writeFile(v.freezerState(path), value)
}
