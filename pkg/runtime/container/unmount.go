package container

import (
	"context"
	"sync"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/disk"
)

// maxUnmounts bounds how many layers of ended sandboxes the kernel may still be unmounting while further sandboxes end. On a
// disk that is slower than callers are, ending one then waits for another's last writes.
const maxUnmounts = 64

// unmounts are the layers that this daemon mounted, and what becomes of them after their sandbox.
//
// The last reference to a sandbox's mounts goes with its PID 1, and the kernel unmounts the layer a clock tick later, on a
// thread of its own: it writes back what is dirty and waits for the disk, milliseconds in which nothing can go wrong that
// could be helped. So nobody waits for that but who wants to mount the layer again. A removed layer's file loses its name
// at once; what has no name, the loop device included, the kernel gives back by itself, whoever dies.
type unmounts struct {
	slots chan struct{}

	mu     sync.Mutex
	layers map[string]*layerMount
	owned  sync.WaitGroup
}

// layerMount is one mount of a layer.
type layerMount struct {
	loop, path string
	once       sync.Once
}

func newUnmounts() *unmounts {
	return &unmounts{slots: make(chan struct{}, maxUnmounts), layers: map[string]*layerMount{}}
}

// mounted notes on which loop device a sandbox's layer lies.
func (u *unmounts) mounted(id, loop, path string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.layers[id] = &layerMount{loop: loop, path: path}
}

// ended is called when a sandbox's last process has gone, perhaps again. Of a layer that another daemon mounted nothing is
// known but its path: that one is waited for.
func (u *unmounts) ended(ctx context.Context, r *Runtime, id string) error {
	u.mu.Lock()
	l := u.layers[id]
	u.mu.Unlock()
	if l == nil {
		return disk.WaitDetached(ctx, disk.LayerPath(r.config.StateDir, id))
	}
	var err error
	l.once.Do(func() {
		select {
		case u.slots <- struct{}{}:
		case <-ctx.Done():
			err = ctx.Err()
			return
		}
		u.owned.Go(func() {
			defer func() { <-u.slots }()
			if err := disk.WaitLoopDetached(context.WithoutCancel(ctx), l.loop, l.path); err != nil {
				r.log.Warn("a writable layer stays mounted", zap.String("sandbox", id), zap.Error(err))
			}
		})
	})
	return err
}

// remove removes a sandbox's layer.
func (u *unmounts) remove(stateDir, id string) error {
	file, err := disk.UnlinkLayer(stateDir, id)
	if file != nil {
		u.owned.Go(func() { _ = file.Close() }) // it was not even read
	}
	if err == nil {
		u.forget(id)
	}
	return err
}

func (u *unmounts) forget(id string) {
	u.mu.Lock()
	defer u.mu.Unlock()
	delete(u.layers, id)
}

func (u *unmounts) wait() { u.owned.Wait() }
