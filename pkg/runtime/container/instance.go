package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// instance is a running sandbox. Its watch goroutine belongs to it: it ends with the agent's process, or when forget
// closes the pidfd.
type instance struct {
	r  *Runtime
	mu sync.Mutex // guards rec.PidsLimit; the rest of rec is fixed

	rec     record
	group   *cgroup.Group
	pidfd   *os.File
	crash   *os.File // nil after a restart of the daemon
	image   *image   // nil after a restart of the daemon
	done    chan struct{}
	watched sync.WaitGroup
	// Closed when watch has ended, for either reason.
	unwatched chan struct{}
}

var _ runtime.CleanKiller = (*instance)(nil)

// newInstance watches a booted agent. It takes over pidfd, crash and the use of img.
func (r *Runtime) newInstance(rec record, pidfd *os.File, group *cgroup.Group, crash *os.File, img *image) *instance {
	i := &instance{r: r, rec: rec, group: group, pidfd: pidfd, crash: crash, image: img, done: make(chan struct{}), unwatched: make(chan struct{})}
	i.watched.Go(i.watch)
	return i
}

func (i *instance) watch() {
	defer close(i.unwatched)
	if waitProcess(i.pidfd) {
		// PID 1 ends last: the kernel has killed and reaped the rest of its namespace before.
		close(i.done)
	}
	if i.image != nil {
		if err := i.r.mounts.do(func() error { return i.r.mounts.leaveImage(i.image) }); err != nil {
			i.r.log.Error("cannot unmount an image", zap.String("sandbox", i.rec.ID), zap.Error(err))
		}
	}
	if i.crash != nil {
		said := crashText(i.crash, 4096) //nolint:mnd // enough to see where a Go program died
		if phase.On() {
			said = agentPhases(i.rec.ID, crashText(i.crash, crashLogSize))
		}
		if said != "" {
			i.r.log.Warn("agent wrote to its standard error", zap.String("sandbox", i.rec.ID), zap.ByteString("stderr", []byte(said)))
		}
		_ = i.crash.Close()
	}
}

// agentPhases moves what a tracing agent says of its phases to the trace, and answers with the rest. It is what an agent
// claims, and so it goes nowhere else.
func agentPhases(id, said string) (rest string) {
	for line := range strings.Lines(said) {
		r := phase.Record{ID: id}
		fields, traced := strings.CutPrefix(strings.TrimSpace(line), spec.PhasePrefix)
		if traced {
			_, err := fmt.Sscan(fields, &r.Start, &r.Took)
			traced = err == nil
		}
		if !traced {
			rest += line
			continue
		}
		r.Phase = "agent: " + strings.Join(strings.Fields(fields)[2:], " ")
		phase.Add(r)
	}
	return rest
}

// forget stops watching; the sandbox goes on.
func (i *instance) forget() {
	_ = i.pidfd.Close()
	i.watched.Wait()
}

// reap waits until the killed agent is gone.
func (i *instance) reap(ctx context.Context) error {
	if err := waitClosed(ctx, i.done); err != nil {
		return err
	}
	waitReaped(ctx, i.pidfd)
	i.forget()
	return nil
}

func (i *instance) running() bool {
	select {
	case <-i.done:
		return false
	default:
		return true
	}
}

// over reports whether the agent's process has ended. If so it returns only after Done is closed, an instant later, so that
// nobody hears of the end from an error first.
func (i *instance) over(ctx context.Context) bool {
	if !ended(i.pidfd) {
		return false
	}
	_ = waitClosed(ctx, i.unwatched) // over either way
	return true
}

// Dial connects to the agent's socket, whose path may be longer than a socket address.
func (i *instance) Dial(ctx context.Context) (net.Conn, error) {
	if !i.running() {
		return nil, runtime.ErrNotRunning
	}
	dir, err := os.OpenFile(i.r.dir(i.rec.ID), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) || i.over(ctx) {
			return nil, runtime.ErrNotRunning
		}
		return nil, spec.Errorf(spec.KindInternal, "cannot dial the agent: %w", err)
	}
	defer dir.Close() //nolint:errcheck // a path descriptor
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(fdPath(dir), socketFile))
	if err != nil {
		if i.over(ctx) {
			return nil, runtime.ErrNotRunning
		}
		return nil, spec.Errorf(spec.KindUnavailable, "cannot dial the agent: %w", err)
	}
	return conn, nil
}

func (i *instance) Kill() error { return i.group.Kill() }

// KillLosesNothing implements runtime.CleanKiller: unmounting the layer writes it back.
func (i *instance) KillLosesNothing() {}

func (i *instance) Done() <-chan struct{} { return i.done }

// Usage counts the agent in, but not in the limits: those are the workload's.
func (i *instance) Usage() (spec.Usage, error) {
	u, err := i.group.Usage()
	if err != nil {
		if i.over(context.Background()) {
			return spec.Usage{}, runtime.ErrNotRunning
		}
		return spec.Usage{}, err
	}
	i.mu.Lock()
	u.PidsLimit = uint64(i.rec.PidsLimit)
	i.mu.Unlock()
	u.DiskBytes, u.DiskLimitBytes, err = disk.Usage(disk.LayerPath(i.r.config.StateDir, i.rec.ID))
	if err != nil {
		return spec.Usage{}, err
	}
	return u, nil
}

func (i *instance) Facts() runtime.Facts {
	return runtime.Facts{HostPID: i.rec.PID, AgentTransport: "unix", IDBase: i.rec.IDBase, AppArmorProfile: i.rec.AppArmor}
}
