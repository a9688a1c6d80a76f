package microvm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// endGrace is how long one of a VM's two processes may outlive the other: the helper hands on what the guest said last.
const endGrace = time.Second

// instance is a VM that runs, or has run.
//
//	          one process ends           endGrace, then killed            both have ended
//	watched ──────────────────▶ ending ─────────────────────────▶ killed ────────────────▶ done
//	   └── abandon: the daemon leaves, the VM runs on
type instance struct {
	rec       record
	dir       string
	group     *cgroup.Group
	transport transport
	logger    *zap.Logger
	// Of its writable layer; empty without one.
	layer string
	// Pidfds of its processes: QEMU, and the vsock helper where there is one.
	processes []*os.File

	// Closed by follow, once.
	done chan struct{}

	mu sync.Mutex
	// The connection by which the guest was seen to be up; the first Dial gets it. Guarded by mu.
	first net.Conn
}

var _ runtime.Instance = (*instance)(nil)

// watch starts following i's processes. Close waits for it.
func (r *Runtime) watch(i *instance) {
	i.done = make(chan struct{})
	r.mu.Lock()
	r.instances[i.rec.ID] = i
	r.mu.Unlock()
	r.owned.Go(i.follow)
}

// follow closes done once every process has ended. One without the other is no sandbox: when one ends the other is ended.
func (i *instance) follow() {
	var waits sync.WaitGroup
	defer waits.Wait()
	ended := make(chan error, len(i.processes)) // nil: ended; otherwise abandoned
	for _, p := range i.processes {
		waits.Go(func() { ended <- waitExit(p) })
	}
	grace := make(<-chan time.Time)
	for n := 0; n < len(i.processes); {
		select {
		case err := <-ended:
			if err != nil {
				return
			}
			n++
			grace = time.After(endGrace)
		case <-grace:
			if err := i.Kill(); err != nil {
				i.logger.Error("cannot kill what is left of a microVM", zap.String("sandbox", i.rec.ID), zap.Error(err))
			}
		}
	}
	i.forget()
	close(i.done)
}

// abandon makes follow return. The VM runs on.
func (i *instance) abandon() { i.forget() }

// forget closes whatever the daemon holds of i.
func (i *instance) forget() {
	for _, p := range i.processes {
		_ = p.Close() // a pidfd has nothing to lose
	}
	if first := i.takeFirst(); first != nil {
		_ = first.Close() // nothing was said on it
	}
	if err := i.transport.Close(); err != nil {
		i.logger.Warn("cannot close the transport of a microVM", zap.String("sandbox", i.rec.ID), zap.Error(err))
	}
}

func (i *instance) takeFirst() net.Conn {
	i.mu.Lock()
	defer i.mu.Unlock()
	first := i.first
	i.first = nil
	return first
}

// Dial implements runtime.Instance.
func (i *instance) Dial(ctx context.Context) (net.Conn, error) {
	select {
	case <-i.done:
		return nil, runtime.ErrNotRunning
	default:
	}
	if first := i.takeFirst(); first != nil {
		return first, nil
	}
	conn, err := i.transport.Dial(ctx)
	if errors.Is(err, net.ErrClosed) {
		return nil, runtime.ErrNotRunning
	}
	if err != nil {
		return nil, fmt.Errorf("cannot reach the agent of microVM %s: %w", i.rec.ID, err)
	}
	return conn, nil
}

// Kill implements runtime.Instance.
func (i *instance) Kill() error { return i.group.Kill() }

// Done implements runtime.Instance.
func (i *instance) Done() <-chan struct{} { return i.done }

// Usage implements runtime.Instance.
func (i *instance) Usage() (spec.Usage, error) {
	usage, err := i.group.Usage()
	if err != nil || i.layer == "" {
		return usage, err
	}
	usage.DiskBytes, usage.DiskLimitBytes, err = disk.Usage(i.layer)
	return usage, err
}

// Facts implements runtime.Instance.
func (i *instance) Facts() runtime.Facts {
	return runtime.Facts{HostPID: i.rec.QEMU.PID, Accelerator: i.rec.Accelerator, AgentTransport: i.rec.Transport.Name}
}
