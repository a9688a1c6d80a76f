package microvm

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Remove implements runtime.Runtime.
func (r *Runtime) Remove(ctx context.Context, id string) error {
	return r.end(ctx, id, false)
}

// Release implements runtime.Runtime.
func (r *Runtime) Release(ctx context.Context, id string) error {
	return r.end(ctx, id, true)
}

func (r *Runtime) end(ctx context.Context, id string, keepLayer bool) error {
	if err := checkID(id); err != nil {
		return err
	}
	if err := r.destroy(ctx, id, keepLayer); err != nil {
		return fmt.Errorf("cannot remove microVM %s: %w", id, err)
	}
	return nil
}

// destroy takes down whatever there is of id, in this order: nothing that a step frees may still be used, and the
// directory by which List finds it goes last. It is for failed starts, removal and recovery alike.
func (r *Runtime) destroy(ctx context.Context, id string, keepLayer bool) error {
	group, err := cgroup.Load(r.cfg.CgroupParent, id)
	if err == nil {
		err = group.Delete(ctx)
	}
	if err != nil && spec.KindOf(err) != spec.KindNotFound {
		return err
	}
	if err := r.awaitEnd(ctx, id); err != nil {
		return err
	}
	if err := r.cfg.IDs.Release(id); err != nil {
		return err
	}
	if !keepLayer {
		if err := disk.RemoveLayer(r.cfg.StateDir, id); err != nil {
			return err
		}
	}
	if err := os.RemoveAll(r.dir(id)); err != nil {
		return fmt.Errorf("cannot remove its directory: %w", err)
	}
	return nil
}

// awaitEnd waits until the watch over a VM whose processes were killed has seen it, so that nothing of it is left in
// the daemon either.
func (r *Runtime) awaitEnd(ctx context.Context, id string) error {
	r.mu.Lock()
	i := r.instances[id]
	r.mu.Unlock()
	if i == nil {
		return nil
	}
	select {
	case <-i.done:
	case <-ctx.Done():
		return errors.Join(errors.New("its processes do not end"), ctx.Err())
	}
	r.mu.Lock()
	delete(r.instances, id)
	r.mu.Unlock()
	return nil
}
