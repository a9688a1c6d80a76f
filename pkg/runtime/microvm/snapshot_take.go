package microvm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// snapshotTimeout bounds the time in which a guest stands still: 256 MiB take a fraction of a second, what is in a large
	// writable layer longer where the file system can't share blocks.
	snapshotTimeout = 2 * time.Minute
	// goOnTimeout bounds letting a guest go on, also when the caller has gone.
	goOnTimeout = 30 * time.Second
	// migrateBandwidth is more than any disk takes, in bytes a second: QEMU would else keep to 128 MiB.
	migrateBandwidth = 1 << 40
	// snapshotPipe is how much of a guest's memory is on its way.
	snapshotPipe = 1 << 20
)

// QEMU's states in which a guest stands still because of a snapshot.
var stoppedStates = map[string]bool{"paused": true, "postmigrate": true, "finish-migrate": true}

// CheckSnapshot implements runtime.Snapshotter.
func (i *instance) CheckSnapshot() error {
	switch {
	case i.rec.Transport.Name != transportPort:
		return spec.Errorf(spec.KindWrongState, "a snapshot cannot be taken of this VM: its agent is reached over %s, which cannot be copied; create it with --snapshots", i.rec.Transport.Name)
	case i.rec.MemoryBytes == 0 || i.layer == "":
		return spec.Errorf(spec.KindWrongState, "a snapshot cannot be taken of this VM: an earlier sandboxd started it; stop it and start it again")
	case i.rec.Networked:
		return spec.Errorf(spec.KindUnsupported, "a snapshot cannot be taken of a VM that is joined to a network: whatever went on from it would have the same address")
	}
	return nil
}

// Snapshot implements runtime.Snapshotter.
func (i *instance) Snapshot(ctx context.Context, dir string, hooks runtime.SnapshotHooks) (taken runtime.Snapshot, err error) {
	if err := i.CheckSnapshot(); err != nil {
		return taken, err
	}
	ctx, cancel := context.WithTimeout(ctx, snapshotTimeout)
	defer cancel()
	qemu, err := i.r.qemuIdentity()
	if err != nil {
		return taken, err
	}
	state, err := createPrivate(filepath.Join(dir, stateFile))
	if err != nil {
		return taken, err
	}
	defer state.Close() //nolint:errcheck // synced below
	layer, err := createPrivate(filepath.Join(dir, snapshotDiskFile))
	if err != nil {
		return taken, err
	}
	defer layer.Close() //nolint:errcheck // synced below
	// What is written now need not be written while the guest stands still.
	if err := syncLayer(i.layer); err != nil {
		return taken, err
	}
	if err := i.copyStanding(ctx, hooks, state, layer); err != nil {
		return taken, fmt.Errorf("cannot take a snapshot: %w", err)
	}
	defer phase.Begin(i.rec.ID, "snapshot: sums")()
	meta := snapshotMeta{Format: snapshotFormat, Accelerator: i.rec.Accelerator, QEMU: qemu, CPUs: i.rec.CPUs, MemoryBytes: i.rec.MemoryBytes, Token: i.rec.Token}
	if _, meta.DiskBytes, err = disk.Usage(i.layer); err != nil {
		return taken, err
	}
	for _, f := range []struct {
		file  *os.File
		sum   *string
		bytes *uint64
	}{{state, &meta.StateSum, &taken.MemoryBytes}, {layer, &meta.DiskSum, &taken.DiskBytes}} {
		if err := f.file.Sync(); err != nil {
			return taken, fmt.Errorf("cannot keep a snapshot: %w", err)
		}
		if *f.sum, err = sumSparse(f.file); err != nil {
			return taken, err
		}
		if *f.bytes, _, err = disk.Usage(f.file.Name()); err != nil {
			return taken, err
		}
	}
	b, err := json.Marshal(meta)
	if err != nil {
		return taken, err
	}
	return taken, writeFileDurable(filepath.Join(dir, snapshotMetaFile), b, 0o400)
}

func createPrivate(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot make a snapshot's file: %w", err)
	}
	return f, nil
}

// copyStanding copies the guest while it stands still, and lets it go on.
func (i *instance) copyStanding(ctx context.Context, hooks runtime.SnapshotHooks, state, layer *os.File) (err error) {
	q, err := i.monitor(ctx)
	if err != nil {
		return err
	}
	defer q.Close() //nolint:errcheck // only asked
	stream, err := q.openStream(ctx, int64(i.rec.MemoryBytes)+maxTemplateState)
	if err != nil {
		return err
	}
	defer stream.Close() //nolint:errcheck // only read
	defer phase.Begin(i.rec.ID, "snapshot: stands still")()
	// Of the caller's end nothing of this depends.
	back, cancel := context.WithTimeout(context.WithoutCancel(ctx), snapshotTimeout+goOnTimeout)
	defer cancel()
	defer func() {
		fault.At("vm snapshot", "to thaw")
		defer phase.Begin(i.rec.ID, "snapshot: thaw")()
		err = errors.Join(err, hooks.Thaw(back))
	}()
	end := phase.Begin(i.rec.ID, "snapshot: freeze")
	err = hooks.Freeze(ctx)
	end()
	if err != nil {
		return err
	}
	fault.At("vm snapshot", "frozen")
	err = i.copyStopped(ctx, q, stream, hooks, state, layer)
	if err == nil {
		err = q.execute(ctx, "cont", nil)
	}
	if err != nil {
		_ = q.Close() // its answer may be outstanding, and QEMU serves one monitor at a time
		if gerr := i.GoOn(back); gerr != nil {
			err = errors.Join(err, fmt.Errorf("cannot let the VM go on: %w", gerr))
		}
	}
	fault.At("vm snapshot", "goes on")
	return err
}

// copyStopped stops the guest and copies it.
func (i *instance) copyStopped(ctx context.Context, q *qmp, stream *stateStream, hooks runtime.SnapshotHooks, state, layer *os.File) error {
	end := phase.Begin(i.rec.ID, "snapshot: stop")
	err := q.execute(ctx, "stop", nil)
	end()
	if err != nil {
		return err
	}
	fault.At("vm snapshot", "stopped")
	end = phase.Begin(i.rec.ID, "snapshot: memory")
	err = q.writeState(ctx, stream, state)
	end()
	if err != nil {
		return err
	}
	fault.At("vm snapshot", "memory copied")
	end = phase.Begin(i.rec.ID, "snapshot: disk")
	err = copyLayer(layer, i.layer)
	end()
	if err != nil {
		return fmt.Errorf("cannot copy its disk: %w", err)
	}
	fault.At("vm snapshot", "disk copied")
	return hooks.Stopped()
}

// stateStream is a pipe into which QEMU writes a guest, through us: a QEMU that writes to a file itself would be charged for its
// pages, and one that is not ours any more could fill the disk.
type stateStream struct {
	*os.File
	limit int64
}

// openStream gives QEMU its end of a stream, before the guest stands still.
func (q *qmp) openStream(ctx context.Context, limit int64) (*stateStream, error) {
	if err := q.ignoreSharedMemory(ctx, false); err != nil { // as a clone did when it began
		return nil, err
	}
	if err := q.executeWith(ctx, "migrate-set-parameters", map[string]any{"max-bandwidth": int64(migrateBandwidth)}, nil, nil); err != nil {
		return nil, err
	}
	reader, theirs, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	if raw, err := reader.SyscallConn(); err == nil {
		// What it has is enough, too.
		_ = raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, snapshotPipe) })
	}
	err = q.executeWith(ctx, "getfd", map[string]any{"fdname": stateFDName}, theirs, nil)
	_ = theirs.Close() // QEMU has its own
	if err != nil {
		return nil, errors.Join(err, reader.Close())
	}
	return &stateStream{reader, limit}, nil
}

// writeState has QEMU write the stopped guest.
func (q *qmp) writeState(ctx context.Context, stream *stateStream, to *os.File) error {
	defer context.AfterFunc(ctx, func() { _ = stream.SetReadDeadline(time.Unix(1, 0)) })()
	copied := make(chan error, 1)
	go func() {
		n, err := io.CopyBuffer(onlyWriter{to}, io.LimitReader(stream, stream.limit), make([]byte, snapshotPipe))
		if err == nil && n == stream.limit {
			err = fmt.Errorf("QEMU writes more than %d bytes", stream.limit)
		}
		copied <- err
		_ = stream.Close() // a QEMU that goes on writing fails
	}()
	err := q.executeWith(ctx, "migrate", map[string]any{"uri": "fd:" + stateFDName}, nil, nil)
	if err == nil {
		err = q.awaitMigration(ctx)
	}
	if err != nil {
		_ = stream.SetReadDeadline(time.Unix(1, 0))
	}
	return errors.Join(err, <-copied)
}

// onlyWriter hides what a file can do besides: it would take a pipe's content in small pieces.
type onlyWriter struct{ io.Writer }

// copyLayer copies a layer that nobody writes: by sharing its blocks where the file system can.
func copyLayer(to *os.File, path string) error {
	from, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	if unix.IoctlFileClone(int(to.Fd()), int(from.Fd())) == nil {
		return nil
	}
	return copyHoles(to, from)
}

// GoOn implements runtime.Snapshotter.
func (i *instance) GoOn(ctx context.Context) error {
	if i.rec.Transport.Name != transportPort {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, goOnTimeout)
	defer cancel()
	select {
	case <-i.done:
		return nil
	default:
	}
	q, err := i.monitor(ctx)
	if err != nil {
		return err
	}
	defer q.Close() //nolint:errcheck // only asked
	for {
		// One that is under way keeps its guest's disk.
		if status, err := q.migration(ctx); err != nil {
			return err
		} else if !status.underway() {
			break
		}
		if err := q.execute(ctx, "migrate_cancel", nil); err != nil {
			return err
		}
		if err := pauseFor(ctx, migratePause); err != nil {
			return err
		}
	}
	status, err := q.status(ctx)
	if err != nil || !stoppedStates[status] {
		return err
	}
	return q.execute(ctx, "cont", nil)
}

func pauseFor(ctx context.Context, d time.Duration) error {
	select {
	case <-time.After(d):
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
