package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strconv"
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

// instance is a running sandbox. Its watch goroutine ends after the agent's process has, or when forget closes the pidfd; the
// runtime waits for it.
type instance struct {
	r  *Runtime
	mu sync.Mutex // guards rec.PidsLimit and rec.Direct; the rest of rec is fixed

	rec   record
	group *cgroup.Group
	pidfd *os.File
	held  held
	done  chan struct{}
	// Closed when watch has ended, for either reason.
	unwatched chan struct{}
}

// held is what the daemon keeps of a sandbox that it started itself; after a restart there is nothing of it.
type held struct {
	crash *os.File
	image *image
	layer *layer
	// The agent's mount namespace. Taking its mounts down takes milliseconds, most of them spent waiting for other processors;
	// whoever lets go of it last waits, and without this that is the agent, whose end everybody waits for.
	mounts *os.File
}

var (
	_ runtime.CleanKiller = (*instance)(nil)
	_ runtime.Adopter     = (*instance)(nil)
)

// newInstance watches a booted agent. It takes over pidfd and what is held, and closes done.
func (r *Runtime) newInstance(rec record, pidfd *os.File, group *cgroup.Group, h held, done chan struct{}) *instance {
	i := &instance{r: r, rec: rec, group: group, pidfd: pidfd, held: h, done: done, unwatched: make(chan struct{})}
	r.watches.Go(i.watch)
	return i
}

func (i *instance) watch() {
	defer close(i.unwatched)
	if waitProcess(i.pidfd) {
		// PID 1 ends last: the kernel has killed and reaped the rest of its namespace before.
		close(i.done)
	}
	h := i.held
	if h.mounts != nil {
		end := phase.Begin(i.rec.ID, "mounts taken down")
		_ = h.mounts.Close() // it was not even read
		end()
	}
	if h.layer != nil {
		close(h.layer.quiet)
	}
	if h.image != nil {
		i.r.mounts.doIfRunning(func() { i.r.mounts.leaveImage(h.image) })
	}
	if h.crash != nil {
		said := crashText(h.crash, 4096) //nolint:mnd // enough to see where a Go program died
		if phase.On() {
			said = agentPhases(i.rec.ID, crashText(h.crash, crashLogSize))
		}
		if said != "" {
			i.r.log.Warn("agent wrote to its standard error", zap.String("sandbox", i.rec.ID), zap.ByteString("stderr", []byte(said)))
		}
		_ = h.crash.Close()
	}
	_ = i.pidfd.Close() // again, if forget did
}

// agentPhases moves what a tracing agent says of its phases to the trace, and answers with the rest. It is what an agent
// claims, and so it goes nowhere else.
func agentPhases(id, said string) string {
	var rest strings.Builder
	for line := range strings.Lines(said) {
		record, traced := agentPhase(line)
		if !traced {
			rest.WriteString(line)
			continue
		}
		record.ID = id
		phase.Add(record)
	}
	return rest.String()
}

// agentPhase reads a line about a phase: the prefix, when it began, how long it took, and its name.
func agentPhase(line string) (r phase.Record, ok bool) {
	said, traced := strings.CutPrefix(strings.TrimSpace(line), spec.PhasePrefix)
	fields := strings.Fields(said)
	if !traced || len(fields) < 2 { //nolint:mnd // two numbers
		return r, false
	}
	var errStart, errTook error
	r.Start, errStart = strconv.ParseInt(fields[0], 10, 64)
	r.Took, errTook = strconv.ParseInt(fields[1], 10, 64)
	r.Phase = "agent: " + strings.Join(fields[2:], " ")
	return r, errStart == nil && errTook == nil
}

// forget stops watching; the sandbox goes on.
func (i *instance) forget() {
	_ = i.pidfd.Close()
	<-i.unwatched
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
	select { // over either way
	case <-i.done:
	case <-i.unwatched:
	case <-ctx.Done():
	}
	return true
}

// Dial implements runtime.Instance.
func (i *instance) Dial(ctx context.Context) (net.Conn, error) {
	if !i.running() {
		return nil, runtime.ErrNotRunning
	}
	dir := i.r.dir(i.rec.ID)
	conn, err := dial(ctx, dir)
	if err != nil {
		if _, gone := os.Lstat(dir); errors.Is(gone, fs.ErrNotExist) || i.over(ctx) {
			return nil, runtime.ErrNotRunning
		}
	}
	return conn, err
}

// dial connects to the agent's socket in a run directory, whose path may be longer than a socket address.
func dial(ctx context.Context, runDir string) (net.Conn, error) {
	dir, err := os.OpenFile(runDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, spec.Errorf(spec.KindInternal, "cannot dial the agent: %w", err)
	}
	defer dir.Close() //nolint:errcheck // a path descriptor
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", filepath.Join(fdPath(dir), socketFile))
	if err != nil {
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

// Adopt implements runtime.Adopter.
func (i *instance) Adopt(pipe *os.File) error {
	if err := pipe.Chown(int(i.rec.IDBase), int(i.rec.IDBase)); err != nil {
		return fmt.Errorf("cannot give a pipe to a sandbox: %w", err)
	}
	return nil
}

func (i *instance) Facts() runtime.Facts { return i.rec.facts() }
