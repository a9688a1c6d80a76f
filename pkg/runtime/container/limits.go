package container

import (
	"context"
	"fmt"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

var (
	_ runtime.LimitChecker = (*Runtime)(nil)
	_ runtime.Updater      = (*instance)(nil)
	_ runtime.Pauser       = (*instance)(nil)
)

// limits are what a sandbox's cgroup is to enforce.
func (r *Runtime) limits(res spec.Resources) cgroup.Limits {
	return cgroup.Limits{
		CPUMillis: res.CPUMillis, CPUWeight: res.CPUWeight, CPUSet: res.CPUSet,
		MemoryBytes: res.MemoryBytes, MemoryHighBytes: res.MemoryHighBytes, SwapBytes: res.SwapBytes, OOMGroup: res.OOMGroup,
		Pids: res.Pids + onTheWayIn + agentPids, InnerPids: res.Pids + onTheWayIn,
		IO: cgroup.IO{
			Disk:    r.config.StateDir,
			ReadBPS: res.IOReadBPS, WriteBPS: res.IOWriteBPS, ReadIOPS: res.IOReadIOPS, WriteIOPS: res.IOWriteIOPS,
		},
		Devices: devices,
	}
}

// CheckLimits implements runtime.LimitChecker.
func (r *Runtime) CheckLimits(res spec.Resources) error {
	if err := cgroup.Check(r.limits(res)); err != nil || !res.LimitsWrites() {
		return err
	}
	return disk.CheckDirect(r.config.StateDir)
}

// CheckUpdate implements runtime.Updater.
func (i *instance) CheckUpdate(now, to spec.Resources) error {
	if now.DiskBytes != to.DiskBytes {
		return spec.Errorf(spec.KindWrongState, "the size of a writable layer in use cannot be changed: make a new workload with the size it needs")
	}
	return i.group.CheckUpdate(i.r.limits(to))
}

// Update implements runtime.Updater.
func (i *instance) Update(_ context.Context, to spec.Resources) error {
	i.mu.Lock()
	rec := i.rec
	i.mu.Unlock()
	if direct := to.LimitsWrites(); direct != rec.Direct {
		if err := i.r.layers.setDirect(rec.ID, direct); err != nil {
			return err
		}
		i.mu.Lock()
		i.rec.Direct = direct
		i.mu.Unlock()
	}
	if err := i.group.Update(i.r.limits(to)); err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	was := rec
	rec = i.rec
	rec.PidsLimit = to.Pids
	if rec == was {
		return nil
	}
	if err := writeRecord(i.r.dir(rec.ID), rec); err != nil {
		return fmt.Errorf("cannot record the limits of sandbox %s: %w", rec.ID, err)
	}
	i.rec = rec
	return nil
}

// Pause implements runtime.Pauser.
func (i *instance) Pause(ctx context.Context) error { return i.group.Freeze(ctx) }

// Resume implements runtime.Pauser.
func (i *instance) Resume() error { return i.group.Thaw() }
