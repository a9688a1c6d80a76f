package microvm

import (
	"context"

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

// limits are what the cgroup of QEMU and its helper is to enforce. A guest's processes and the order in which its kernel
// kills them are the guest's. shared is what a clone's may be charged of its template's memory: see template.sharedBytes.
func (r *Runtime) limits(res spec.Resources, accel string, shared uint64) cgroup.Limits {
	beyond := vmmOverhead[accel] + shared
	l := cgroup.Limits{
		CPUMillis: res.CPUMillis, CPUWeight: res.CPUWeight, CPUSet: res.CPUSet,
		MemoryBytes: res.MemoryBytes + beyond, SwapBytes: res.SwapBytes,
		Pids: maxVMMPids,
		IO: cgroup.IO{
			Disk:    r.cfg.StateDir,
			ReadBPS: res.IOReadBPS, WriteBPS: res.IOWriteBPS, ReadIOPS: res.IOReadIOPS, WriteIOPS: res.IOWriteIOPS,
			Direct: true,
		},
		Devices: vmmDevices,
	}
	if res.MemoryHighBytes > 0 {
		l.MemoryHighBytes = res.MemoryHighBytes + beyond
	}
	return l
}

// CheckLimits implements runtime.LimitChecker. How much the VMM needs on top does not matter to what a host can enforce.
func (r *Runtime) CheckLimits(res spec.Resources) error {
	if err := cgroup.Check(r.limits(res, accelKVM, 0)); err != nil || !res.LimitsWrites() {
		return err
	}
	return disk.CheckDirect(r.cfg.StateDir)
}

// vcpus is how many processors a guest has: whole ones, for a share of the last one is the cgroup's to enforce.
func vcpus(millis uint32) uint32 { return min(max((millis+999)/1000, 1), maxCPUs) }

// guestBytes is a guest's memory: whole pages.
func guestBytes(r spec.Resources) uint64 { return r.MemoryBytes &^ (1<<12 - 1) }

// CheckUpdate implements runtime.Updater. What a guest was booted with it keeps: its memory, its processors, its disk, and
// the limits within it. What QEMU may use of the host can be changed.
func (i *instance) CheckUpdate(now, to spec.Resources) error {
	for _, fixed := range []struct {
		changed bool
		what    string
	}{
		{now.MemoryBytes != to.MemoryBytes, "its guest has the memory it booted with, and no device to give some back or take more"},
		{vcpus(to.CPUMillis) > vcpus(now.CPUMillis), "its guest has as many processors as it booted with: less can be had of them, not more"},
		{now.Pids != to.Pids, "its guest's kernel was told at boot how many processes there may be"},
		{now.OOMGroup != to.OOMGroup, "its guest's kernel was told at boot what to do when memory runs out"},
		{now.DiskBytes != to.DiskBytes, "the size of a writable layer in use cannot be changed"},
	} {
		if fixed.changed {
			return spec.Errorf(spec.KindWrongState, "this cannot be changed while a VM runs: %s; stop it, update it and start it again", fixed.what)
		}
	}
	return i.group.CheckUpdate(i.r.limits(to, i.rec.Accelerator, i.rec.SharedBytes))
}

// Update implements runtime.Updater.
func (i *instance) Update(ctx context.Context, to spec.Resources) error {
	if err := i.setDirectDisk(ctx, to.LimitsWrites()); err != nil {
		return err
	}
	return i.group.Update(i.r.limits(to, i.rec.Accelerator, i.rec.SharedBytes))
}

// Pause implements runtime.Pauser: it freezes QEMU and the vsock helper from outside. Other than QMP's stop it needs no
// answer of QEMU's, which may be the attacker's by then, it stops the helper too, and time goes on for the guest as it does
// for a paused container.
func (i *instance) Pause(ctx context.Context) error { return i.group.Freeze(ctx) }

// Resume implements runtime.Pauser.
func (i *instance) Resume() error { return i.group.Thaw() }
