package microvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// hasLayer reports whether there is a writable layer of an earlier run: it is not to be replaced by an empty one.
func (r *Runtime) hasLayer(id string) bool {
	_, err := os.Lstat(r.layerDir(id))
	return !errors.Is(err, fs.ErrNotExist)
}

func (r *Runtime) layerDir(id string) string { return filepath.Dir(disk.LayerPath(r.cfg.StateDir, id)) }

// getReady has a clone's agent do, and QEMU translate, what can be done before anybody is known whose it will be: its root is mounted
// when it answers its first call. It is told name, time and random bytes again when it is.
func (i *instance) getReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, cloneTimeout)
	defer cancel()
	client := agent.New(i.Dial, i.Done())
	_, err := client.Configure(ctx, waitingName, nil)
	client.Close()
	if err != nil {
		return err
	}
	conn, err := i.Dial(ctx) // its next one, so that a start need not wait for that
	if err != nil {
		return err
	}
	i.mu.Lock()
	i.first = conn
	i.mu.Unlock()
	return i.stopForNow(ctx)
}

// waitingName is the host name of a clone that is nobody's.
const waitingName = "waiting"

// stopForNow stops a clone's processors, with it its clock. While it waits it takes no time of the host's.
func (i *instance) stopForNow(ctx context.Context) error {
	q, err := i.monitor(ctx)
	if err != nil {
		return err
	}
	defer q.Close() //nolint:errcheck // only asked
	return q.execute(ctx, "stop", nil)
}

// become gives a clone that waited the sandbox's id and limits, and lets it go on. The record has named cgroup and user id from the
// first instant on, and each rename is atomic: whenever the daemon dies, removing the sandbox removes all of it. named
// says whether what is left to remove has the sandbox's id. Last, the record says that it waits no more: until then the next daemon
// finds no VM there that runs.
func (i *instance) become(ctx context.Context, s spec.Sandbox) (named bool, err error) {
	waited := i.rec.ID
	if err := renameNew(i.r.dir(waited), i.r.dir(s.ID)); err != nil {
		return false, err
	}
	fault.At("vm from the pool", "directory named")
	i.rename(s)
	if err := renameNew(i.r.layerDir(waited), i.r.layerDir(s.ID)); err != nil {
		return true, errors.Join(err, disk.RemoveLayer(i.r.cfg.StateDir, waited))
	}
	fault.At("vm from the pool", "layer named")
	if err := i.voices.log.Keep(s.ConsolePath); err != nil {
		return true, err
	}
	if err := i.group.Update(i.r.limits(s.Resources, i.rec.Accelerator, i.rec.SharedBytes)); err != nil {
		return true, err
	}
	q, err := i.monitor(ctx)
	if err != nil {
		return true, err
	}
	defer q.Close() //nolint:errcheck // only asked
	if err := q.execute(ctx, "cont", nil); err != nil {
		return true, err
	}
	fault.At("vm from the pool", "goes on")
	if err := i.rec.save(i.dir); err != nil {
		return true, err
	}
	fault.At("vm from the pool", "recorded")
	return true, nil
}

// rename has the daemon know an instance by another id. Nobody has it yet but who follows its processes.
func (i *instance) rename(s spec.Sandbox) {
	i.r.mu.Lock()
	delete(i.r.instances, i.rec.ID)
	i.r.instances[s.ID] = i
	i.r.mu.Unlock()
	i.mu.Lock()
	defer i.mu.Unlock()
	i.rec.ID, i.rec.ConsolePath, i.rec.Waits = s.ID, s.ConsolePath, false
	i.dir, i.layer = i.r.dir(s.ID), disk.LayerPath(i.r.cfg.StateDir, s.ID)
	if t, ok := i.transport.(*portTransport); ok {
		t.moved(i.dir)
	}
}

// name is the id by which it is known now.
func (i *instance) name() string {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.rec.ID
}

// hasEnded reports whether its processes are gone.
func (i *instance) hasEnded() bool {
	select {
	case <-i.done:
		return true
	default:
		return false
	}
}

// renameNew renames to a name that must be free.
func renameNew(from, to string) error {
	if err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE); err != nil {
		return fmt.Errorf("cannot rename %s: %w", from, err)
	}
	return nil
}
