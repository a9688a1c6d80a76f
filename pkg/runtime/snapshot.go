package runtime

import (
	"context"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Snapshotter is an Instance whose memory, processors, devices and writable layer can be written down while it runs.
type Snapshotter interface {
	Instance
	// CheckSnapshot refuses what can't be: KindWrongState with the reason. It asks nobody.
	CheckSnapshot() error
	// Snapshot fills the empty directory dir, which is the caller's to remove. The sandbox stands still for as short as can
	// be, and runs on whatever becomes of the snapshot, unless the daemon dies: then GoOn.
	Snapshot(ctx context.Context, dir string, hooks SnapshotHooks) (Snapshot, error)
	// GoOn has the sandbox run that a Snapshot of a daemon that died left standing still. Idempotent.
	GoOn(ctx context.Context) error
}

// SnapshotHooks are what the caller does at the moments of a Snapshot.
type SnapshotHooks struct {
	// Freeze comes before the sandbox is stopped, so that its agent alone runs in what goes on from the snapshot until it is told
	// who it is.
	Freeze func(context.Context) error
	// Stopped is called while nothing of the sandbox runs.
	Stopped func() error
	// Thaw undoes Freeze once the sandbox runs again; it is called whatever Freeze and the snapshot came to.
	Thaw func(context.Context) error
}

// Snapshot is what there is of one.
type Snapshot struct {
	// What its memory and its disk take in the directory.
	MemoryBytes, DiskBytes uint64
}

// Restorer is a Runtime that can start a sandbox from what a Snapshotter filled.
type Restorer interface {
	// Restore is Start, from dir, which it does not change. s has the image, the processors and the memory of the sandbox that
	// the snapshot was taken of. Its processes are frozen: they are the caller's to thaw. KindWrongState where the snapshot is
	// damaged or can't be used on this host as it is now.
	Restore(ctx context.Context, s spec.Sandbox, dir string) (Instance, error)
}
