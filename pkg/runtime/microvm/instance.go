package microvm

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"
	"sync/atomic"
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
	r         *Runtime
	rec       record // as it began: see directDisk
	dir       string
	group     *cgroup.Group
	transport transport
	logger    *zap.Logger
	// Of its writable layer; empty without one.
	layer string
	// Its processes: QEMU, and the vsock helper where there is one.
	processes []member
	voices    *voices
	// It was ended on purpose.
	killed atomic.Bool

	// Where its network card is; nil without one, and once that is connected. Guarded by mu.
	netns *os.File

	// Closed by follow, once; why is set before.
	done chan struct{}
	why  string

	mu sync.Mutex
	// The connection by which the guest was seen to be up; the first Dial gets it. Guarded by mu.
	first net.Conn
	// How it writes to its disk now; rec says how it began. Guarded by mu.
	directDisk bool

	// Held while QEMU is asked, and nothing else is then: see addWritten.
	writtenMu sync.Mutex
	// The guest's writes, when last heard of. Guarded by writtenMu.
	wroteBytes, wrote uint64
}

// member is one of a VM's processes.
type member struct {
	name  string // memberQEMU or memberHelper
	pidfd *os.File
}

// qemu is QEMU's pidfd.
func (i *instance) qemu() *os.File {
	for _, p := range i.processes {
		if p.name == memberQEMU {
			return p.pidfd
		}
	}
	return nil // never: there is no VM without
}

var (
	_ runtime.Instance  = (*instance)(nil)
	_ runtime.Explainer = (*instance)(nil)
	_ runtime.OwnKernel = (*instance)(nil)
)

// watch starts following i's processes. Close waits for it.
func (r *Runtime) watch(i *instance) {
	i.done = make(chan struct{})
	i.directDisk = i.rec.DirectDisk
	r.mu.Lock()
	r.instances[i.rec.ID] = i
	r.mu.Unlock()
	r.owned.Go(i.follow)
}

// follow closes done once every process has ended. One without the other is no sandbox: when one ends the other is ended.
func (i *instance) follow() {
	var waits sync.WaitGroup
	defer waits.Wait()
	ended := make(chan death, len(i.processes))
	for _, p := range i.processes {
		waits.Go(func() {
			status, err := waitExit(p.pidfd)
			ended <- death{p.name, status, err}
		})
	}
	grace := make(<-chan time.Time)
	var deaths []death
	for len(deaths) < len(i.processes) {
		select {
		case d := <-ended:
			if d.err != nil {
				i.endVoices((*voices).leave)
				return
			}
			deaths = append(deaths, d)
			grace = time.After(endGrace)
		case <-grace:
			if err := i.group.Kill(); err != nil {
				i.logger.Error("cannot kill what is left of a microVM", zap.String("sandbox", i.name()), zap.Error(err))
			}
		}
	}
	i.endVoices((*voices).end)
	i.why = i.explain(deaths)
	i.logger.Info("microVM ended", zap.String("sandbox", i.name()), zap.String("why", i.why), zap.Stringers("processes", deaths),
		zap.String("qemu", quote(i.voices.qemu)), zap.String("helper", quote(i.voices.helper)))
	i.forget()
	close(i.done)
}

func (i *instance) endVoices(how func(*voices) error) {
	if err := how(i.voices); err != nil {
		i.logger.Warn("the console's log of a microVM is incomplete", zap.String("sandbox", i.name()), zap.Error(err))
	}
}

// abandon makes follow return. The VM runs on.
func (i *instance) abandon() { i.forget() }

// forget closes whatever the daemon holds of i.
func (i *instance) forget() {
	for _, p := range i.processes {
		_ = p.pidfd.Close() // it has nothing to lose
	}
	i.dropNetNS()
	if first := i.takeFirst(); first != nil {
		_ = first.Close() // nothing was said on it
	}
	if err := i.transport.Close(); err != nil {
		i.logger.Warn("cannot close the transport of a microVM", zap.String("sandbox", i.name()), zap.Error(err))
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
func (i *instance) Kill() error {
	i.killed.Store(true)
	return i.group.Kill()
}

// Why implements runtime.Explainer.
func (i *instance) Why() string {
	select {
	case <-i.done:
		return i.why
	default:
		return ""
	}
}

// HasOwnKernel implements runtime.OwnKernel.
func (i *instance) HasOwnKernel() {}

// Done implements runtime.Instance.
func (i *instance) Done() <-chan struct{} { return i.done }

// Usage implements runtime.Instance.
func (i *instance) Usage() (spec.Usage, error) {
	usage, err := i.group.Usage()
	if errors.Is(err, fs.ErrNotExist) {
		err = runtime.ErrNotRunning // released
	}
	if err != nil || i.layer == "" {
		return usage, err
	}
	i.addWritten(&usage)
	usage.DiskBytes, usage.DiskLimitBytes, err = disk.Usage(i.layer)
	return usage, err
}

// Facts implements runtime.Instance.
func (i *instance) Facts() runtime.Facts {
	return runtime.Facts{HostPID: i.rec.QEMU.PID, Accelerator: i.rec.Accelerator, AgentTransport: i.rec.Transport.Name, StartedFrom: i.rec.StartedFrom, StartNote: i.rec.StartNote}
}
