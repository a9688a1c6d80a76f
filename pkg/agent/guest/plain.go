package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

// ServePlain is an agent WITHOUT WALLS for tests of what lies above the runtimes: it serves on l from the caller's own
// process until ctx is done or Shutdown was called. The container's root is the caller's, no process is confined and user,
// rlimits and capabilities are ignored. Everything it started has ended when it returns, but what made a session of its own.
//
// No program may call it: a test of this package looks for it in the built sandbox-agent, where the linker leaves out what
// nothing calls.
func ServePlain(ctx context.Context, l net.Listener) error {
	w := &plainWall{children: newChildren()}
	err := newService(w).Serve(ctx, l)
	w.mu.Lock()
	w.closed = true // calls may still be under way
	w.mu.Unlock()
	_ = w.signalAll(unix.SIGKILL)
	w.owned.Wait()
	for _, pid := range w.leaders {
		_, _ = ignoringEINTR(func() (int, error) { return unix.Wait4(pid, nil, 0, nil) })
	}
	return err
}

type plainWall struct {
	children *children

	mu     sync.Mutex // held while something is begun
	closed bool
	// Of all process groups that were ever started. Each is a child and, once it has ended, a zombie until ServePlain returns:
	// as long as it is, its number is no other process's, and what it left running can be signalled by it.
	leaders []int
	owned   sync.WaitGroup
}

var errPlainClosed = errors.New("the agent has ended")

func (*plainWall) configure(string, time.Time, []byte, *network) error { return nil }

func (*plainWall) ownClock() bool { return false }

func (*plainWall) freeze(context.Context, bool) error { return errNoFreezer }

func (*plainWall) enter(*specs.Spec, []byte) (*root, error) {
	r := &root{}
	for _, d := range []struct {
		into *(*os.File)
		path string
	}{{&r.dir, "/"}, {&r.proc, "/proc"}, {&r.pts, "/dev"}} {
		f, err := openDir(d.path)
		if err != nil {
			return nil, err
		}
		*d.into = f
	}
	null, err := os.OpenFile("/dev/null", os.O_RDWR, 0)
	r.null = null
	return r, err
}

func (w *plainWall) spawn(c *confined, stdio [3]*os.File, ended func(unix.WaitStatus)) (int, error) {
	if st, err := os.Stat(c.Cwd); err != nil || !st.IsDir() {
		return 0, &stageFailure{agentv1.ExecFailure_REASON_BAD_WORKDIR, fmt.Sprintf("cannot enter the working directory: %s is none", c.Cwd)}
	}
	attr := &syscall.ProcAttr{
		Dir: c.Cwd, Env: c.Env, Files: []uintptr{stdio[0].Fd(), stdio[1].Fd(), stdio[2].Fd()},
		Sys: &syscall.SysProcAttr{Setsid: true, Setctty: c.Terminal, Ctty: 0},
	}
	candidates := []string{c.Args[0]}
	if !strings.Contains(c.Args[0], "/") {
		candidates = nil
		for dir := range strings.SplitSeq(searchPath(c.Env), ":") {
			candidates = append(candidates, dir+"/"+c.Args[0])
		}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return 0, errPlainClosed
	}
	err := error(unix.ENOENT)
	for _, program := range candidates {
		var pid int
		pid, err = w.children.start(func() (int, error) { return syscall.ForkExec(program, c.Args, attr) }, ended)
		if err == nil {
			w.leaders = append(w.leaders, pid)
			w.owned.Go(func() { w.children.awaitOne(pid) })
			return pid, nil
		}
		if !errors.Is(err, unix.ENOENT) {
			break
		}
	}
	return 0, execFailure(c.Args[0], err, "no such file")
}

func (w *plainWall) copy(job *copyJob, stdio [3]*os.File, ended func(unix.WaitStatus, string)) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return 0, errPlainClosed
	}
	var own [2]*os.File
	for i := range own {
		fd, err := unix.FcntlInt(stdio[i].Fd(), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return 0, err
		}
		own[i] = os.NewFile(uintptr(fd), stdio[i].Name())
	}
	w.owned.Go(func() {
		err := job.run(own[0], own[1])
		own[0].Close()
		own[1].Close()
		if err != nil {
			ended(unix.WaitStatus(copyExitCode(job, err)<<8), err.Error())
			return
		}
		ended(0, "")
	})
	return 0, nil
}

func (w *plainWall) signal(p *process, sig syscall.Signal) error {
	return w.children.signal(p.pid, sig)
}

// signalAll reaches the process groups of what was started here, and no other: this is no PID 1.
func (w *plainWall) signalAll(sig syscall.Signal) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, pid := range w.leaders {
		if err := unix.Kill(-pid, sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return err
		}
	}
	return nil
}

func (w *plainWall) gone() bool { return w.children.running() == 0 }

func (*plainWall) sync() {}

func (*plainWall) oomKills(*os.File) (uint64, error) { return 0, nil }
