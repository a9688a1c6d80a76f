package container

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/fault"
)

const (
	// maxLeaving bounds how many layers of ended sandboxes may still be mounted, or being unmounted, while further sandboxes
	// end. On a disk that is slower than callers are, ending one then waits for another's last writes.
	maxLeaving = 64
	// linger is how long the layer of an ended sandbox stays mounted for who removes the sandbox next.
	linger = 250 * time.Millisecond
	// maxSpares is how many empty layers are kept, spareLife how long one is that nobody takes.
	maxSpares = 4
	spareLife = 10 * time.Second
	// quietTimeout bounds how long the mounts of a sandbox that has ended are waited for.
	quietTimeout = 10 * time.Second
	// maxCleaned and maxGrown bound what a layer that becomes a spare may have held: files and directories, and bytes on the
	// host's disk beyond those of a new one. Emptying a layer with more takes longer than making another, and what was
	// written stays in the file.
	maxCleaned = 64
	maxGrown   = 1 << 20
)

// layers are the writable layers that this daemon mounted, and what becomes of them after their sandbox.
//
// Making a layer and unmounting it are the dearest parts of a short sandbox's life. So the daemon has a mount of each layer's file
// system beside the sandbox's, and one that the sandbox hardly used becomes a spare when the sandbox is removed: its files are
// deleted, and the next sandbox that wants one of that size gets the file system. Nothing of them is left then that a sandbox
// could read: it sees files, never the device, and the file system counts as many free blocks and inodes as when it was new, or
// is not used again. Spares lie in a directory of their own, which the next daemon clears.
//
// All other layers are unmounted, the last by the kernel, on a thread of its own: it writes back what is dirty and waits for the
// disk, milliseconds in which nothing can go wrong that could be helped. So nobody waits for that but who wants to mount the
// layer again. A removed layer's file loses its name at once; what has no name, the loop device included, the kernel gives back by
// itself, whoever dies.
type layers struct {
	r       *Runtime
	leaving chan struct{}
	owned   sync.WaitGroup

	mu      sync.Mutex // guards what follows
	mounted map[string]*layer
	spares  []*layer
	closed  bool
}

// layer is one file system.
type layer struct {
	dir  string // guarded by layers.mu
	size uint64
	loop string // the device's node
	// A mount of it that no sandbox has; nil once it is given up.
	mount *os.File
	// What a new one has.
	fresh disk.Occupied
	// Closed when the mounts of its sandbox are gone.
	quiet chan struct{}
	// When it is given up, unless somebody takes it before. Guarded by layers.mu.
	timer *time.Timer
	// It has a place in leaving.
	left bool
	// What is written to it goes past the host's page cache. Guarded by layers.mu.
	direct bool
}

func newLayers(r *Runtime) *layers {
	return &layers{r: r, leaving: make(chan struct{}, maxLeaving), mounted: map[string]*layer{}}
}

func layerDir(stateDir, id string) string { return filepath.Dir(disk.LayerPath(stateDir, id)) }

func (ls *layers) spareDir() string { return filepath.Join(ls.r.config.StateDir, "spare-layers") }

// clear removes the spares of a daemon that died. The kernel has unmounted them.
func (ls *layers) clear() error {
	// A state directory that is none fails the first start, which says so.
	if err := os.RemoveAll(ls.spareDir()); err != nil && !errors.Is(err, unix.ENOTDIR) {
		return fmt.Errorf("cannot remove spare writable layers: %w", err)
	}
	return nil
}

// mountFile puts a layer's file behind a loop device and mounts it, for sandbox id.
func (ls *layers) mountFile(id, path string, size uint64) (*layer, error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open the writable layer: %w", err)
	}
	defer f.Close() //nolint:errcheck // the loop device has its own reference
	loop, err := disk.AttachLoop(f, false)
	if err != nil {
		return nil, err
	}
	defer loop.Close() //nolint:errcheck // the mount keeps the device
	l := &layer{dir: layerDir(ls.r.config.StateDir, id), size: size, loop: loop.Name(), quiet: make(chan struct{})}
	fault.At("container start", "layer on a loop device")
	if l.mount, err = l.again(); err == nil {
		l.fresh, err = disk.Occupies(l.mount, path)
	}
	if err != nil {
		l.close()
		return nil, fmt.Errorf("cannot mount the writable layer: %w", err)
	}
	ls.mu.Lock()
	defer ls.mu.Unlock()
	ls.mounted[id] = l
	return l, nil
}

// again makes one more mount of the file system.
func (l *layer) again() (*os.File, error) {
	return mountFS("ext4", unix.MOUNT_ATTR_NODEV, option{"source", l.loop}, option{"errors", "remount-ro"})
}

// file is the layer's own.
func (l *layer) file() string { return filepath.Join(l.dir, filepath.Base(disk.LayerPath("", ""))) }

// close gives up the daemon's mount. The kernel unmounts the file system when the sandbox's are gone too.
func (l *layer) close() {
	if l.mount != nil {
		_ = l.mount.Close() // nothing was written through it
		l.mount = nil
	}
}

// spare answers with an empty layer of that size, mounted and now sandbox id's; nil if there is none. Its directory has the
// sandbox's name: it is removed with the sandbox whenever the daemon dies.
func (ls *layers) spare(id string, size uint64) (*layer, error) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	for i, l := range ls.spares {
		if l.size != size || !l.timer.Stop() {
			continue
		}
		ls.spares = append(ls.spares[:i:i], ls.spares[i+1:]...)
		dir := layerDir(ls.r.config.StateDir, id)
		if err := renameNew(l.dir, dir); err != nil {
			ls.owned.Go(func() { ls.discard(l) })
			return nil, err
		}
		l.dir = dir
		ls.mounted[id] = l
		return l, nil
	}
	return nil, nil
}

// rename: the layer of one that waited in the pool is now a sandbox's.
func (ls *layers) rename(from, to string) {
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if l := ls.mounted[from]; l != nil {
		delete(ls.mounted, from)
		l.dir = layerDir(ls.r.config.StateDir, to)
		ls.mounted[to] = l
	}
}

// setDirect has what a sandbox writes to its layer go past the host's page cache, or again through it.
func (ls *layers) setDirect(id string, direct bool) error {
	ls.mu.Lock()
	l := ls.mounted[id]
	same := l != nil && l.direct == direct
	ls.mu.Unlock()
	if same {
		return nil
	}
	if err := disk.SetLayerDirect(disk.LayerPath(ls.r.config.StateDir, id), direct); err != nil {
		return err
	}
	if l != nil {
		ls.mu.Lock()
		l.direct = direct
		ls.mu.Unlock()
	}
	return nil
}

// ended is called when a sandbox's last process has gone, perhaps again. Of a layer that another daemon mounted nothing is
// known but its path: that one is waited for.
func (ls *layers) ended(ctx context.Context, id string) error {
	ls.mu.Lock()
	l := ls.mounted[id]
	first := l != nil && !l.left
	if first {
		l.left = true
	}
	ls.mu.Unlock()
	if l == nil {
		return disk.WaitDetached(ctx, disk.LayerPath(ls.r.config.StateDir, id))
	}
	if !first {
		return nil
	}
	select {
	case ls.leaving <- struct{}{}:
	case <-ctx.Done():
		ls.mu.Lock()
		l.left = false
		ls.mu.Unlock()
		return ctx.Err()
	}
	ls.mu.Lock()
	defer ls.mu.Unlock()
	if ls.mounted[id] != l { // removed or settled meanwhile
		<-ls.leaving
		return nil
	}
	wait := linger
	if len(ls.leaving) > maxLeaving/2 {
		wait = 0 // others need the place
	}
	l.timer = time.AfterFunc(wait, func() { ls.settle(id) })
	return nil
}

// settle unmounts the layer of a sandbox that has ended, or waits for who does; of others it knows nothing.
func (ls *layers) settle(id string) {
	ls.mu.Lock()
	l := ls.takeLocked(id)
	if l != nil {
		ls.owned.Add(1)
	}
	ls.mu.Unlock()
	if l == nil {
		return
	}
	defer ls.owned.Done()
	ls.unmount(l)
}

// takeLocked takes a layer out of those that are mounted.
func (ls *layers) takeLocked(id string) *layer {
	l := ls.mounted[id]
	if l == nil {
		return nil
	}
	delete(ls.mounted, id)
	if l.timer != nil {
		l.timer.Stop() // or it finds nothing
	}
	return l
}

// unmount gives a layer up and waits until the kernel has unmounted it.
func (ls *layers) unmount(l *layer) {
	l.close()
	if err := disk.WaitLoopDetached(context.Background(), filepath.Base(l.loop), l.file()); err != nil {
		ls.r.log.Warn("a writable layer stays mounted", zap.String("layer", l.dir), zap.Error(err))
	}
	if l.left {
		<-ls.leaving
	}
}

// remove removes a sandbox's layer, or makes a spare of it.
func (ls *layers) remove(id string) error {
	ls.mu.Lock()
	l := ls.takeLocked(id)
	keep := l != nil && l.left && !l.direct && !ls.closed && len(ls.spares) < maxSpares
	if keep {
		keep = ls.withdrawLocked(l)
	}
	ls.mu.Unlock()
	if keep {
		ls.owned.Go(func() { ls.recycle(l) })
		return nil
	}
	file, err := disk.UnlinkLayer(ls.r.config.StateDir, id)
	ls.owned.Go(func() {
		if l != nil {
			ls.unmount(l)
		}
		if file != nil {
			_ = file.Close() // it was not even read
		}
	})
	return err
}

// withdrawLocked takes a layer away from its sandbox's name.
func (ls *layers) withdrawLocked(l *layer) bool {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		return false
	}
	dir := filepath.Join(ls.spareDir(), hex.EncodeToString(b[:]))
	err := renameNew(l.dir, dir)
	if errors.Is(err, fs.ErrNotExist) { // the first of all
		if err = os.MkdirAll(ls.spareDir(), 0o700); err == nil {
			err = renameNew(l.dir, dir)
		}
	}
	if err != nil {
		return false
	}
	l.dir = dir
	return true
}

// recycle makes a spare of a layer, if it is like new once it is empty.
func (ls *layers) recycle(l *layer) {
	fault.At("container end", "layer withdrawn")
	err := ls.empty(l)
	if l.left {
		l.left = false
		<-ls.leaving
	}
	if err != nil {
		ls.discard(l)
		return
	}
	l.quiet = make(chan struct{})
	ls.mu.Lock()
	keep := !ls.closed && len(ls.spares) < maxSpares
	if keep {
		l.timer = time.AfterFunc(spareLife, func() { ls.expire(l) })
		ls.spares = append(ls.spares, l)
	}
	ls.mu.Unlock()
	if !keep {
		ls.discard(l)
	}
}

// errUsed: a layer is not worth emptying.
var errUsed = errors.New("it has been used too much")

// empty deletes what a sandbox left in a layer and makes sure that it is as when it was new.
func (ls *layers) empty(l *layer) error {
	select {
	case <-l.quiet:
	case <-time.After(quietTimeout):
		return errors.New("its sandbox's mounts do not go")
	}
	if err := disk.Empty(l.mount, maxCleaned); err != nil {
		return err
	}
	now, err := disk.Occupies(l.mount, l.file())
	if err != nil {
		return err
	}
	if now.Writable != l.fresh.Writable || now.FreeBlocks != l.fresh.FreeBlocks || now.FreeInodes != l.fresh.FreeInodes || now.HostBytes > l.fresh.HostBytes+maxGrown {
		return errUsed
	}
	return nil
}

func (ls *layers) expire(l *layer) {
	ls.mu.Lock()
	found := false
	for i, s := range ls.spares {
		if s == l {
			ls.spares = append(ls.spares[:i:i], ls.spares[i+1:]...)
			found = true
			ls.owned.Add(1)
			break
		}
	}
	ls.mu.Unlock()
	if found {
		defer ls.owned.Done()
		ls.discard(l)
	}
}

// discard removes a layer that is no sandbox's.
func (ls *layers) discard(l *layer) {
	if err := os.RemoveAll(l.dir); err != nil {
		ls.r.log.Warn("cannot remove a spare writable layer", zap.String("layer", l.dir), zap.Error(err))
	}
	ls.unmount(l)
}

// close removes the spares, and gives up the daemon's mounts of layers whose sandboxes go on.
func (ls *layers) close() {
	ls.mu.Lock()
	ls.closed = true
	spares := ls.spares
	ls.spares = nil
	for id, l := range ls.mounted {
		if l.timer != nil {
			l.timer.Stop()
		}
		delete(ls.mounted, id)
		l.close()
	}
	ls.mu.Unlock()
	for _, l := range spares {
		if l.timer.Stop() {
			ls.discard(l)
		}
	}
	ls.owned.Wait()
}
