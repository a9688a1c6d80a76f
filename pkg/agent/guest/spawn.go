package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/rawfork"
	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// maxStatusBytes bounds what a child or a stage says.
const maxStatusBytes = 16 << 10

// stages fork: the one way a process of the workload, or a copy, comes into being behind a real wall.
type stages struct {
	children *children
	// Where they start, set before the first; nil for the agent's own.
	cgroup *os.File
	// Held by who waits on a thread of its own: hear.
	hearing sync.Mutex
}

// stageProgram is the agent's own program, found from its working directory: a procfs of its own (rootfs.goHome), which no
// name leads to. What the workload makes of /proc, where it may mount, decides nothing.
const stageProgram = "self/exe"

func newStages(c *children) *stages { return &stages{children: c} }

// spawn forks a child that confines itself and becomes the workload, with stdio as its descriptors 0 to 2, and waits until it
// has. ended is called when the process has ended, also after a failure.
func (s *stages) spawn(c *confined, stdio [3]*os.File, ended func(unix.WaitStatus)) (int, error) {
	end := phase("process: fork")
	var status [2]int
	if err := unix.Pipe2(status[:], unix.O_CLOEXEC); err != nil {
		return 0, fmt.Errorf("cannot make a pipe: %w", err)
	}
	c.stdio = stdio
	calls, failure := c.plan(uintptr(status[1]))
	if failure != nil {
		unix.Close(status[0])
		unix.Close(status[1])
		return 0, failure
	}
	// What the child works with is in this process's memory: held until it has its own, or has ended.
	var held atomic.Pointer[rawfork.Child]
	pid, err := s.children.start(func() (int, error) {
		child, err := calls.Fork(s.cgroup, uintptr(status[1]), c.staysRoot())
		if err != nil {
			return 0, err
		}
		held.Store(child)
		return child.PID, nil
	}, func(ws unix.WaitStatus) {
		if child := held.Load(); child != nil {
			child.Hold()
		}
		ended(ws)
	})
	end()
	unix.Close(status[1]) // the child has its own
	if err != nil {
		unix.Close(status[0])
		return 0, cannotFork(err)
	}
	defer phase("process: confine and execute")()
	said, err := s.hear(status[0])
	if err != nil {
		_ = s.children.signal(pid, unix.SIGKILL)
		return 0, &stageFailure{agentv1.ExecFailure_REASON_CONFINEMENT, fmt.Sprintf("cannot hear from the new process: %v", err)}
	}
	held.Store(nil)
	if failure := c.parseStatus(calls, said); failure != nil {
		return 0, failure
	}
	return pid, nil
}

// hear reads what a child writes to its status pipe until it is closed, and closes fd. The first who comes waits on its own thread,
// which is woken once, by the end of the pipe: Go's poller takes two threads and several switches between them. Who comes
// meanwhile waits in the poller, or starts that hang would each hold a thread.
func (s *stages) hear(fd int) ([]byte, error) {
	if !s.hearing.TryLock() {
		status, err := pollable(fd, "pipe")
		if err != nil {
			return nil, err
		}
		defer status.Close()
		if err := status.SetReadDeadline(time.Now().Add(stageTimeout)); err != nil {
			return nil, err
		}
		return io.ReadAll(io.LimitReader(status, maxStatusBytes))
	}
	defer s.hearing.Unlock()
	defer unix.Close(fd)
	if err := waitHangup(fd, stageTimeout); err != nil {
		return nil, err
	}
	said := make([]byte, 2*rawfork.ReportBytes) // more than it says
	n, err := ignoringEINTR(func() (int, error) { return unix.Read(fd, said) })
	return said[:max(n, 0)], err
}

// waitHangup waits on the calling thread until nobody can write to the pipe fd any more.
func waitHangup(fd int, patience time.Duration) error {
	poll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return fmt.Errorf("cannot wait: %w", err)
	}
	defer unix.Close(poll)
	// Of no event: hang-ups are told in any case, and data alone wakes nobody.
	if err := unix.EpollCtl(poll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{}); err != nil {
		return fmt.Errorf("cannot wait: %w", err)
	}
	until := time.Now().Add(patience)
	for {
		left := time.Until(until)
		if left <= 0 {
			return os.ErrDeadlineExceeded
		}
		var event unix.EpollEvent
		// epoll_pwait: the agent's filter allows Go's own calls, and no epoll_wait.
		n, _, errno := unix.Syscall6(unix.SYS_EPOLL_PWAIT, uintptr(poll), uintptr(unsafe.Pointer(&event)), 1, uintptr(left.Milliseconds()+1), 0, 0)
		switch {
		case errno == unix.EINTR:
		case errno != 0:
			return fmt.Errorf("cannot wait: %w", errno)
		case n > 0:
			return nil
		}
	}
}

// parseStatus reads what a child wrote before its pipe closed: see childReady.
func (c *confined) parseStatus(calls *rawfork.Calls, said []byte) *stageFailure {
	ready := len(said) > 0 && said[0] == childReady && len(said) != rawfork.ReportBytes
	if ready {
		said = said[1:]
	}
	if len(said) == 0 {
		if ready {
			return nil
		}
		return &stageFailure{agentv1.ExecFailure_REASON_CONFINEMENT, "the new process died before it was confined"}
	}
	call, errno, err := calls.Failed(said)
	if err != nil {
		return &stageFailure{agentv1.ExecFailure_REASON_CONFINEMENT, fmt.Sprintf("the new process's report can't be read: %v", err)}
	}
	return c.failure(call, errno)
}

// copy starts a stage that does a copy. ended is called with what it said of a failure.
func (s *stages) copy(job *copyJob, stdio [3]*os.File, ended func(unix.WaitStatus, string)) (int, error) {
	heard := make(chan *os.File, 1)
	pid, status, err := s.fork(job, stdio, func(ws unix.WaitStatus) {
		// The stage forks nothing, so its end of the pipe is closed and this read can't wait.
		status := <-heard
		defer status.Close()
		said, _ := io.ReadAll(io.LimitReader(status, maxStatusBytes))
		var f stageFailure
		_ = json.Unmarshal(said, &f)
		ended(ws, f.Message)
	})
	if err != nil {
		return 0, err
	}
	heard <- status
	return pid, nil
}

func (s *stages) fork(job *copyJob, stdio [3]*os.File, ended func(unix.WaitStatus)) (int, *os.File, error) {
	encoded, err := json.Marshal(job)
	if err != nil {
		return 0, nil, fmt.Errorf("cannot encode orders: %w", err)
	}
	memory, err := newMemFile("orders", encoded)
	if err != nil {
		return 0, nil, err
	}
	defer memory.Close()
	status, theirs, err := newPipe()
	if err != nil {
		return 0, nil, err
	}
	defer theirs.Close()
	files := []uintptr{stdio[0].Fd(), stdio[1].Fd(), stdio[2].Fd(), stageJobFD: memory.Fd(), stageStatusFD: theirs.Fd()}
	attr := &syscall.ProcAttr{Files: files, Env: weaken.Now()} // none: of an empty environment nothing can leak, and a stage needs none
	if s.cgroup != nil {
		attr.Sys = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(s.cgroup.Fd())}
	}
	pid, err := s.children.start(func() (int, error) {
		return syscall.ForkExec(stageProgram, []string{StageName}, attr)
	}, ended)
	if err != nil {
		status.Close()
		return 0, nil, cannotFork(err)
	}
	return pid, status, nil
}

// errFull is what the kernel answers to a fork past a limit of processes.
var errFull = errors.New("cannot fork: the sandbox has reached its limit of processes; end some of them, or stop it")

func cannotFork(err error) error {
	if errors.Is(err, unix.EAGAIN) {
		return errFull
	}
	return fmt.Errorf("cannot fork: %w", err)
}

// startError is what the daemon is told where no process of the workload's is to blame.
func startError(what string, err error) error {
	if errors.Is(err, errFull) {
		return exhausted("cannot start %s: %v", what, err)
	}
	return internal("cannot start %s: %v", what, err)
}

func (f *stageFailure) Error() string { return f.Message }

// asFailure is err as the daemon shall see it, or nil if it is not the process's fault.
func asFailure(err error) *agentv1.ExecFailure {
	var f *stageFailure
	if !errors.As(err, &f) {
		return nil
	}
	return &agentv1.ExecFailure{Reason: f.Reason, Message: f.Message}
}

// newPipe returns a pipe whose read end is the agent's, in Go's poller, and whose write end is a child's, blocking.
func newPipe() (ours, theirs *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("cannot make a pipe: %w", err)
	}
	ours, err = pollable(fds[0], "pipe")
	if err != nil {
		unix.Close(fds[1])
		return nil, nil, err
	}
	return ours, os.NewFile(uintptr(fds[1]), "pipe"), nil
}

// newOutputPipe is newPipe with room for much output. What one user may have of that is limited; then the kernel's default
// has to do.
func newOutputPipe() (ours, theirs *os.File, err error) {
	ours, theirs, err = newPipe()
	if err == nil {
		_, _ = unix.FcntlInt(theirs.Fd(), unix.F_SETPIPE_SZ, readSize)
	}
	return ours, theirs, err
}

// newInputPipe is newPipe the other way round.
func newInputPipe() (theirs, ours *os.File, err error) {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
		return nil, nil, fmt.Errorf("cannot make a pipe: %w", err)
	}
	ours, err = pollable(fds[1], "pipe")
	if err != nil {
		unix.Close(fds[0])
		return nil, nil, err
	}
	return os.NewFile(uintptr(fds[0]), "pipe"), ours, nil
}

// pollable makes fd a file whose reads and writes wait in Go's poller and know deadlines. It closes fd if it fails.
func pollable(fd int, name string) (*os.File, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("cannot make %s pollable: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

// newMemFile is a file in memory with the given content. Unlike a pipe it takes any size without a reader.
func newMemFile(name string, content []byte) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) { // before Linux 6.3
		fd, err = unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("cannot make a memory file: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	if _, err := f.Write(content); err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot fill a memory file: %w", err)
	}
	return f, nil
}
