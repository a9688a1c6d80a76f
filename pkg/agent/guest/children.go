package guest

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// children is the only place that forks and the only one that reaps. Both happen under one lock, so a child can't be
// reaped before it is registered, and a pid in the table is never that of another process.
type children struct {
	// Where it forks; nil for wherever it is called. Set before the first.
	within func(fork func() (int, error)) (int, error)

	mu    sync.Mutex
	byPID map[int]func(unix.WaitStatus) // called under mu when the child has ended
}

func newChildren() *children {
	return &children{byPID: map[int]func(unix.WaitStatus){}}
}

// start runs fork and registers what it answers. ended is called once, under the lock, with the child's wait status.
func (c *children) start(fork func() (int, error), ended func(unix.WaitStatus)) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if within := c.within; within != nil {
		inner := fork
		fork = func() (int, error) { return within(inner) }
	}
	pid, err := fork()
	if err != nil {
		return 0, err
	}
	c.byPID[pid] = ended
	return pid, nil
}

var errEnded = errors.New("process has ended")

// signal sends sig to a child that has not been reaped.
func (c *children) signal(pid int, sig syscall.Signal) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, runs := c.byPID[pid]; !runs {
		return errEnded
	}
	return unix.Kill(pid, sig)
}

// reapAll is the reaper of PID 1: the children that were started here, and every orphan of the sandbox. It returns when
// ctx is done.
func (c *children) reapAll(ctx context.Context) {
	ended := make(chan os.Signal, 1)
	signal.Notify(ended, unix.SIGCHLD)
	defer signal.Stop(ended)
	for {
		c.reapEnded()
		select {
		case <-ended:
		case <-ctx.Done():
			return
		}
	}
}

func (c *children) reapEnded() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		var status unix.WaitStatus
		pid, err := ignoringEINTR(func() (int, error) { return unix.Wait4(-1, &status, unix.WNOHANG, nil) })
		if err != nil || pid <= 0 {
			return
		}
		c.endedLocked(pid, status)
	}
}

// awaitOne waits for one child, where the agent is not PID 1 and other children are not its business. It leaves the child a
// zombie.
func (c *children) awaitOne(pid int) {
	var info unix.Siginfo
	_, err := ignoringEINTR(func() (int, error) {
		return pid, unix.Waitid(unix.P_PID, pid, &info, unix.WEXITED|unix.WNOWAIT, nil)
	})
	if err != nil {
		return // somebody else has reaped it
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.endedLocked(pid, statusOf(&info))
}

// statusOf is the wait status that waitid(2) tells of in another form. si_status comes after four words and, to the kernel's
// alignment of a union with pointers, two more: see siginfo_t.
func statusOf(info *unix.Siginfo) unix.WaitStatus {
	const cldExited, cldDumped, dumped = 1, 3, 0x80
	status := (*[7]int32)(unsafe.Pointer(info))[6]
	switch info.Code {
	case cldExited:
		return unix.WaitStatus(status << 8)
	case cldDumped:
		return unix.WaitStatus(status | dumped)
	default:
		return unix.WaitStatus(status)
	}
}

func (c *children) endedLocked(pid int, status unix.WaitStatus) {
	if ended := c.byPID[pid]; ended != nil {
		delete(c.byPID, pid)
		ended(status)
	}
}

// running counts the children that have not been reaped.
func (c *children) running() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.byPID)
}
