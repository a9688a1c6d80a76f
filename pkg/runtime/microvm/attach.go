package microvm

import (
	"context"
	"errors"
	"fmt"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Attach implements runtime.Runtime.
func (r *Runtime) Attach(ctx context.Context, id string) (runtime.Instance, error) {
	if err := checkID(id); err != nil {
		return nil, err
	}
	if i := r.running(id); i != nil {
		return i, nil
	}
	rec, err := loadRecord(r.dir(id))
	if err != nil {
		return nil, err
	}
	if rec.Waits { // half handed out when its daemon died: it is as good as never started
		return nil, runtime.ErrNotRunning
	}
	i, err := r.reopen(rec)
	if err != nil {
		return nil, fmt.Errorf("cannot attach to microVM %s: %w", id, err)
	}
	r.watch(i)
	return i, nil
}

// running is the instance of id that r watches already; nil if there is none, or it has ended.
func (r *Runtime) running(id string) *instance {
	r.mu.Lock()
	defer r.mu.Unlock()
	i := r.instances[id]
	if i == nil {
		return nil
	}
	select {
	case <-i.done:
		return nil
	default:
		return i
	}
}

// reopen finds what a record speaks of.
func (r *Runtime) reopen(rec record) (_ *instance, err error) {
	group, err := cgroup.Load(rec.CgroupParent, rec.madeAs())
	if spec.KindOf(err) == spec.KindNotFound {
		return nil, runtime.ErrNotRunning
	}
	if err != nil {
		return nil, err
	}
	i := &instance{r: r, rec: rec, dir: r.dir(rec.ID), group: group, logger: r.cfg.Logger}
	if rec.HasDisks {
		i.layer = disk.LayerPath(r.cfg.StateDir, rec.ID)
	}
	defer func() {
		if err != nil {
			for _, p := range i.processes {
				err = errors.Join(err, p.pidfd.Close())
			}
		}
	}()
	for _, p := range rec.processes() {
		pidfd, err := p.process.open()
		if errors.Is(err, errGone) {
			// Whatever is left of it is no sandbox.
			return nil, errors.Join(runtime.ErrNotRunning, group.Kill())
		}
		if err != nil {
			return nil, err
		}
		i.processes = append(i.processes, member{p.name, pidfd})
	}
	token, err := rec.token()
	if err != nil {
		return nil, err
	}
	if i.transport, err = r.attachTransport(rec, token); err != nil {
		return nil, err
	}
	if i.voices, err = findVoices(rec, r.cfg.Logger); err != nil {
		return nil, errors.Join(err, i.transport.Close())
	}
	return i, nil
}

func (r *Runtime) attachTransport(rec record, token bootToken) (transport, error) {
	switch {
	case rec.Transport.Name == transportVhostUser:
		return attachVhostUser(r.dir(rec.ID), rec.Transport, token)
	case rec.Transport.Name == transportPort:
		return attachPort(r.dir(rec.ID), rec.Transport, token), nil
	case r.hub != nil:
		return r.hub.attach(rec.Transport, token)
	default:
		return nil, fmt.Errorf("its agent speaks over the kernel's vsock, which is not usable any more: %w", r.hubErr)
	}
}
