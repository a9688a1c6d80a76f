package microvm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/fault"
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
	fault.At("vm end", "begun")
	if err := r.killAll(ctx, id); err != nil {
		return err
	}
	if err := r.awaitEnd(ctx, id); err != nil {
		return err
	}
	fault.At("vm end", "processes ended")
	if err := r.cfg.IDs.Release(r.madeAs(id)); err != nil {
		return err
	}
	fault.At("vm end", "ids")
	if !keepLayer {
		if err := disk.RemoveLayer(r.cfg.StateDir, id); err != nil {
			return err
		}
	}
	fault.At("vm end", "layer deleted")
	if err := os.RemoveAll(r.dir(id)); err != nil {
		return fmt.Errorf("cannot remove its directory: %w", err)
	}
	fault.At("vm end", "directory removed")
	return nil
}

// madeAs is the id by which the user id of a VM goes.
func (r *Runtime) madeAs(id string) string {
	rec, err := loadRecord(r.dir(id))
	if err != nil {
		return id // nothing was made of it that had another
	}
	return rec.madeAs()
}

// killAll kills everything in id's cgroup and removes that; then the processes of its record, should they be elsewhere:
// what they use is about to be given to others.
func (r *Runtime) killAll(ctx context.Context, id string) error {
	rec, err := loadRecord(r.dir(id))
	if err != nil {
		// None, or one that was being written when its daemon died: nothing ran yet that it could name.
		rec = record{CgroupParent: r.cfg.CgroupParent}
	}
	if i := r.running(id); i != nil {
		i.killed.Store(true)
	}
	group, err := cgroup.Load(rec.CgroupParent, cmp.Or(rec.madeAs(), id))
	if err == nil {
		err = group.Delete(ctx)
	}
	if err != nil && spec.KindOf(err) != spec.KindNotFound {
		return err
	}
	fault.At("vm end", "cgroup deleted")
	for _, p := range []process{rec.QEMU, rec.Helper} {
		if err := p.end(ctx); err != nil {
			return fmt.Errorf("cannot end process %d: %w", p.PID, err)
		}
	}
	return nil
}

// end kills a process, if it is still there, and waits until it has gone.
func (p process) end(ctx context.Context) error {
	pidfd, err := p.open()
	if errors.Is(err, errGone) {
		return nil
	}
	if err != nil {
		return err
	}
	defer pidfd.Close() //nolint:errcheck // nothing to lose
	if err := killProcess(pidfd); err != nil {
		return err
	}
	if end, ok := ctx.Deadline(); ok {
		if err := pidfd.SetReadDeadline(end); err != nil {
			return err
		}
	}
	stop := context.AfterFunc(ctx, func() { _ = pidfd.SetReadDeadline(time.Now()) })
	defer stop()
	// Whoever is its parent reaps it.
	return onExit(pidfd, func(uintptr) {})
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
