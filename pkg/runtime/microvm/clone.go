package microvm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// What a VM was started from, as runtime.Facts shows it.
const (
	startedCold     = "cold"
	startedTemplate = "template"
	startedPool     = "pool"
	startedSnapshot = "snapshot"
)

// cloneTimeout bounds the start of a clone: seen 0.1 s under TCG alone on a machine. One that takes longer is given up, and
// the VM is booted.
const (
	cloneTimeout = 20 * time.Second
	// incomingPause is between two looks at a QEMU that takes over a state, which takes it about 3 ms.
	incomingPause = time.Millisecond
	// statusIncoming is its state while it does.
	statusIncoming = "inmigrate"
)

// startFrom starts a VM the quickest way there is: as a clone where there is a template for it, else by booting it.
func (r *Runtime) startFrom(ctx context.Context, s spec.Sandbox, g *guest, accel string) (*instance, error) {
	defer r.pool.begin()()
	b := &boot{r: r, sandbox: s, guest: g, accel: accel, timeout: bootTimeout}
	// A clone is reached over the kernel's vsock where there is one, and a snapshot needs a port.
	if r.templates == nil || s.ImagePath == "" || s.Snapshots && r.hub != nil {
		return b.run(ctx)
	}
	key, err := r.templateKey(s, g, accel)
	if err != nil {
		return nil, err
	}
	waiting, err := r.startFromPool(ctx, s, key)
	if waiting != nil {
		r.pool.want(s, key, g, accel)
		return waiting, nil
	}
	if ctx.Err() != nil {
		return nil, err
	}
	if err != nil { // one clone's own trouble: the template may be as good as ever
		r.cfg.Logger.Warn("a clone that had waited did not go on, another is made", zap.String("sandbox", s.ID), zap.String("template", key.short()), zap.Error(err))
		b.note = fmt.Sprintf("a clone that had waited did not go on: %v", err)
	}
	t, note := r.templates.find(key)
	if t != nil {
		defer t.release()
		c := &boot{r: r, sandbox: s, guest: g, accel: accel, timeout: cloneTimeout, clone: t, note: b.note}
		i, err := c.run(ctx)
		if err == nil {
			r.pool.want(s, key, g, accel)
		}
		if err == nil || ctx.Err() != nil || spec.KindOf(err) == spec.KindAlreadyExists {
			return i, err
		}
		// Whatever was wrong: a template that does not come up is of no use, and the next one is made anew.
		note = fmt.Sprintf("the clone of template %s did not come up: %v", key.short(), err)
		if err := r.templates.drop(key); err != nil {
			return nil, err
		}
	}
	if note != "" {
		r.cfg.Logger.Warn("a VM is booted although there was a template", zap.String("sandbox", s.ID), zap.String("template", key.short()), zap.String("why", note))
	}
	b.note = cmp.Or(note, b.note)
	i, err := b.run(ctx)
	if err == nil {
		r.wantTemplate(key, s, g, accel)
	}
	return i, err
}

func (b *boot) startedFrom() string {
	switch {
	case b.ahead:
		return startedPool
	case b.restore != nil:
		return startedSnapshot
	case b.clone != nil:
		return startedTemplate
	}
	return startedCold
}

// templateFiles gives QEMU what a template is made in, or a clone is made of.
func (b *boot) templateFiles(a *vmArgs, j *jail, add func(*os.File, error) int) {
	j.descriptors = b.making != nil || b.clone != nil
	switch {
	case b.making != nil:
		a.Memory, a.MemoryShared = add(b.making.memory, nil), true
	case b.clone != nil:
		a.Memory = add(b.clone.memory, nil)
		a.Incoming = true
	}
}

// goOn lets QEMU open its guest's memory, and a clone's take over its template's state, upon which the guest runs.
func (b *boot) goOn(ctx context.Context, i *instance) error {
	// Only now QEMU goes on: it has been shown its descriptors.
	q, err := i.monitor(ctx)
	if err != nil {
		return err
	}
	defer q.Close() //nolint:errcheck // only asked
	switch {
	case b.clone != nil:
		// Opened anew: each reads it from its beginning.
		state, err := os.Open(fdPath(int(b.clone.state.Fd())))
		if err != nil {
			return fmt.Errorf("cannot open the template's state: %w", err)
		}
		defer state.Close() //nolint:errcheck // only read
		if err := q.ignoreSharedMemory(ctx, true); err != nil {
			return err
		}
		if err := q.takeOver(ctx, state); err != nil {
			return err
		}
	case b.restore != nil:
		q.limit = restoreTimeout
		if err := q.takeOver(ctx, b.restore.state); err != nil {
			return err
		}
		return q.execute(ctx, "cont", nil)
	}
	if err := hideDescriptors(i.qemu()); err != nil || b.clone == nil {
		return err
	}
	return q.execute(ctx, "cont", nil)
}

// takeOver has QEMU read a state. The guest is stopped then, as it was when the state was taken.
func (q *qmp) takeOver(ctx context.Context, state *os.File) error {
	if err := q.executeWith(ctx, "getfd", map[string]any{"fdname": stateFDName}, state, nil); err != nil {
		return err
	}
	if err := q.executeWith(ctx, "migrate-incoming", map[string]any{"uri": "fd:" + stateFDName}, nil, nil); err != nil {
		return err
	}
	for {
		status, err := q.status(ctx)
		if err != nil || status != statusIncoming {
			return err
		}
		select {
		case <-time.After(incomingPause):
		case <-ctx.Done():
			return fmt.Errorf("cannot take over the guest's state: %w", ctx.Err())
		}
	}
}

// ignoreSharedMemory leaves the guest's memory, which is the template's file, out of what QEMU writes or reads, or not.
func (q *qmp) ignoreSharedMemory(ctx context.Context, on bool) error {
	return q.executeWith(ctx, "migrate-set-capabilities", map[string]any{
		"capabilities": []map[string]any{{"capability": "x-ignore-shared", "state": on}},
	}, nil, nil)
}

// adopt tells a clone who it is, over the first connection of its agent, which stays open: see spec/channel.go.
func (i *instance) adopt(ctx context.Context, conn net.Conn) (_ net.Conn, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("cannot adopt the clone: %w", err), ignoreClosed(conn.Close()))
		}
	}()
	return i.tell(ctx, conn)
}
