package cgroup

import (
	"fmt"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// CheckUpdate refuses limits that the group, as it is now, cannot be given: KindWrongState.
func (g *Group) CheckUpdate(l Limits) error {
	if err := check(g.h, l); err != nil {
		return err
	}
	u, err := g.Usage()
	if err != nil {
		return err
	}
	// The kernel would kill for it with v2, and refuse with v1.
	if l.MemoryBytes > 0 && l.MemoryBytes < u.MemoryWorkingSetBytes {
		return spec.Errorf(spec.KindWrongState, "it uses %d MiB of memory, more than the %d MiB it is to be limited to: stop it, or give it more", u.MemoryWorkingSetBytes>>20, l.MemoryBytes>>20)
	}
	return nil
}

// Update brings the limits of a group with processes to l; Devices stay as they are. After an error some of them may
// have been changed: Update again. Idempotent.
func (g *Group) Update(l Limits) error {
	if err := check(g.h, l); err != nil {
		return err
	}
	if err := g.h.update(g.path, l); err != nil {
		return fmt.Errorf("cannot change the limits of the cgroup %s: %w", g.path, err)
	}
	fault.At("cgroup", "updated")
	return nil
}
