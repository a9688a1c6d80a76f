package microvm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// defaultTemplateDelay is between a boot and the making of a template of it: who started one VM starts others.
	defaultTemplateDelay = 3 * time.Second
	// migrateTimeout bounds writing a template's state: seen 4 ms.
	migrateTimeout = 30 * time.Second
	migratePause   = 2 * time.Millisecond
	// templateNice is the priority at which templates are made: somebody else's processes are waited for.
	templateNice = 10
	// templateRetry is how long one that could not be made is not tried again.
	templateRetry = 5 * time.Minute
	// stateFDName is under what name QEMU has the file of a state.
	stateFDName = "state"
)

// making is a template while its guest boots.
type making struct{ memory *os.File }

// wantTemplate has a template made for key, some time after a VM was booted for want of one.
func (r *Runtime) wantTemplate(key templateKey, s spec.Sandbox, g *guest, accel string) {
	if !r.templates.claim(key, guestBytes(s.Resources)) {
		return
	}
	r.makers.Go(func() {
		defer r.templates.unclaim(key)
		select {
		case <-time.After(r.templates.config.Delay):
		case <-r.life.Done():
			return
		}
		if err := r.makeTemplate(r.life, key, s, g, accel); err != nil && r.life.Err() == nil {
			r.templates.fail(key)
			r.cfg.Logger.Warn("cannot make a template, VMs like it are booted", zap.String("template", key.short()), zap.Duration("until", templateRetry), zap.Error(err))
		}
	})
}

// claim reports whether the caller is to make the template for key.
func (s *templateStore) claim(key templateKey, bytes uint64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.wanted[key] || s.known[key] != nil || time.Since(s.failed[key]) < templateRetry || bytes > s.config.MaxBytes {
		return false
	}
	s.wanted[key] = true
	return true
}

func (s *templateStore) unclaim(key templateKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.wanted, key)
}

func (s *templateStore) fail(key templateKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failed[key] = time.Now()
}

// makeTemplate boots a guest like s's, takes its memory and state, and removes it.
func (r *Runtime) makeTemplate(ctx context.Context, key templateKey, s spec.Sandbox, g *guest, accel string) (err error) {
	r.templates.making.Lock()
	defer r.templates.making.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	environment, err := r.environment(g)
	if err != nil {
		return err
	}
	if err := r.templates.sweep(hashOf(environment)); err != nil {
		return err
	}
	began := time.Now()
	t := &template{held: 1, meta: templateMeta{
		Format: templateFormat, Key: key, Environment: hashOf(environment), Image: s.ImagePath, Scope: s.TemplateScope,
		CPUs: vcpus(s.Resources.CPUMillis), MemoryBytes: guestBytes(s.Resources), Accelerator: accel, Transport: r.templateTransport(),
		Made: began.UTC(),
	}}
	if err := r.bootTemplate(ctx, t, s, g, accel); err != nil {
		return fmt.Errorf("cannot make a template: %w", err)
	}
	if err := r.templates.add(t); err != nil {
		t.release()
		return err
	}
	fault.At("vm template", "kept")
	r.cfg.Logger.Info("made a template", zap.String("template", key.short()), zap.String("image", s.ImagePath),
		zap.Uint64("memory", t.meta.MemoryBytes), zap.Duration("took", time.Since(began).Round(time.Millisecond)))
	r.pool.want(s, key, g, accel)
	return nil
}

// bootTemplate fills t.memory and t.state.
func (r *Runtime) bootTemplate(ctx context.Context, t *template, s spec.Sandbox, g *guest, accel string) (err error) {
	if t.memory, err = newMemfd("template-memory"); err != nil {
		return err
	}
	if t.state, err = newMemfd("template-state"); err != nil {
		return errors.Join(err, t.memory.Close())
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.memory.Close(), t.state.Close())
		}
	}()
	if err := t.memory.Truncate(int64(t.meta.MemoryBytes)); err != nil {
		return fmt.Errorf("cannot make its memory: %w", err)
	}
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return fmt.Errorf("cannot draw an id: %w", err)
	}
	// Nothing of the workload that it is first made for: neither its console, nor which network it is joined to.
	s = spec.Sandbox{ID: hex.EncodeToString(id), ImagePath: s.ImagePath, Resources: templateResources(s.Resources), Network: s.Network, TemplateScope: s.TemplateScope}
	b := &boot{r: r, sandbox: s, guest: g, accel: accel, timeout: bootTimeout, making: &making{memory: t.memory}}
	i, err := b.run(ctx)
	if err != nil {
		return err
	}
	fault.At("vm template", "guest stands")
	err = i.takeState(ctx, t.state)
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if err := errors.Join(err, r.destroy(undo, s.ID, false)); err != nil {
		return err
	}
	fault.At("vm template", "taken")
	// Only now nobody has it mapped to write.
	if err := seal(t.memory); err != nil {
		return err
	}
	return seal(t.state)
}

// templateResources are those that a template's guest needs: its shape, and the processors that such a guest may use.
func templateResources(r spec.Resources) spec.Resources {
	return spec.Resources{CPUMillis: r.CPUMillis, MemoryBytes: r.MemoryBytes, Pids: r.Pids, DiskBytes: r.DiskBytes}
}

// takeState stops the guest and has QEMU write all but its memory to state.
func (i *instance) takeState(ctx context.Context, state *os.File) error {
	ctx, cancel := context.WithTimeout(ctx, migrateTimeout)
	defer cancel()
	q, err := i.monitor(ctx)
	if err != nil {
		return err
	}
	defer q.Close() //nolint:errcheck // only asked
	if err := q.execute(ctx, "stop", nil); err != nil {
		return err
	}
	if err := q.ignoreSharedMemory(ctx, true); err != nil {
		return err
	}
	if err := q.executeWith(ctx, "getfd", map[string]any{"fdname": stateFDName}, state, nil); err != nil {
		return err
	}
	if err := q.executeWith(ctx, "migrate", map[string]any{"uri": "fd:" + stateFDName}, nil, nil); err != nil {
		return err
	}
	return q.awaitMigration(ctx)
}

// migration is how QEMU fares with writing its guest.
type migration struct {
	Status    string `json:"status"`
	ErrorDesc string `json:"error-desc"`
}

// underway reports whether it has begun and not ended.
func (m migration) underway() bool {
	switch m.Status {
	case "", "none", "completed", "failed", "cancelled":
		return false
	}
	return true
}

func (q *qmp) migration(ctx context.Context) (m migration, err error) {
	err = q.execute(ctx, "query-migrate", &m)
	return m, err
}

// awaitMigration returns when QEMU has written its guest.
func (q *qmp) awaitMigration(ctx context.Context) error {
	for {
		m, err := q.migration(ctx)
		if err != nil {
			return err
		}
		switch m.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fmt.Errorf("cannot take the guest's state: QEMU says %s: %s", m.Status, m.ErrorDesc)
		}
		select {
		case <-time.After(migratePause):
		case <-ctx.Done():
			return fmt.Errorf("cannot take the guest's state: %w", ctx.Err())
		}
	}
}

// lowerPriority makes a process yield to others. Threads that it makes later inherit that.
func lowerPriority(p process) error {
	if err := unix.Setpriority(unix.PRIO_PROCESS, p.PID, templateNice); err != nil {
		return fmt.Errorf("cannot lower the priority of process %d: %w", p.PID, err)
	}
	return nil
}

// makeTemplateFor makes the template that s would be cloned from.
func (r *Runtime) makeTemplateFor(ctx context.Context, s spec.Sandbox) (templateKey, error) {
	accel, err := r.accelerator(ctx)
	if err != nil {
		return "", err
	}
	g, err := r.guest()
	if err != nil {
		return "", err
	}
	key, err := r.templateKey(s, g, accel)
	if err != nil {
		return "", err
	}
	return key, r.makeTemplate(ctx, key, s, g, accel)
}
