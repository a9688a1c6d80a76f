package microvm

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/osthread"
)

// lastCapability is more than any kernel has; dropping stops at the first that it does not know.
const lastCapability = 63

// command is a process of a VM: QEMU or the vsock helper.
type command struct {
	// Where it lies in its jail, as what it is called.
	path string
	args []string
	// Its descriptors from 3 on.
	files []*os.File
	// Standard output and error.
	out, err *os.File
	jail     *jail
	// User and group it runs as, and the group that may open /dev/kvm, if it needs that.
	uid    uint32
	groups []uint32
}

// process is a process on the host, named so that it cannot be mistaken for a later one of the same pid.
type process struct {
	PID int `json:"pid"`
	// Field 22 of /proc/PID/stat: clock ticks from the host's boot.
	StartTime uint64 `json:"startTime"`
}

// start runs c in the cgroup, confined. The order of the confinement, every step fatal:
//
//	this thread, before the clone         cgroup; no_new_privs; mount namespace and root: see jail; empty capability
//	                                      bounding set
//	the child, by the kernel at clone     namespaces: pid, net, ipc, uts
//	the child, before exec                session; groups, gid, uid (its capabilities end here); no descriptor but those
//	                                      listed
//
// What QEMU and the helper add themselves: seccomp.
func (c command) start(group *cgroup.Group) (p process, pidfd *os.File, err error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDONLY, 0)
	if err != nil {
		return process{}, nil, err
	}
	defer null.Close()
	files := []uintptr{null.Fd(), c.out.Fd(), c.err.Fd()}
	for _, f := range c.files {
		files = append(files, f.Fd())
	}
	fd := -1
	err = group.Start(func(attr *syscall.SysProcAttr) error {
		if err := c.jail.build(); err != nil {
			return fmt.Errorf("cannot build its jail: %w", err)
		}
		if err := confineThread(); err != nil {
			return err
		}
		attr.Cloneflags = unix.CLONE_NEWPID | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS
		attr.Setsid = true
		attr.Credential = &syscall.Credential{Uid: c.uid, Gid: c.uid, Groups: c.groups}
		attr.PidFD = &fd
		pid, err := syscall.ForkExec(c.path, append([]string{c.path}, c.args...), &syscall.ProcAttr{
			Dir:   "/",
			Env:   []string{},
			Files: files,
			Sys:   attr,
		})
		p.PID = pid
		return err
	})
	if err != nil {
		return process{}, nil, fmt.Errorf("cannot run %s: %w", c.path, err)
	}
	// Our child: its pid stays its own until it is waited for.
	if pidfd, err = newPidfd(fd); err == nil {
		p.StartTime, err = startTime(p.PID)
	}
	if err == nil {
		err = cgroup.DropOOMProtection(p.PID)
	}
	if err != nil {
		err = errors.Join(err, syscall.Kill(p.PID, syscall.SIGKILL))
		_, _ = syscall.Wait4(p.PID, nil, 0, nil) // it was killed just now
		return process{}, nil, fmt.Errorf("cannot follow %s: %w", c.path, err)
	}
	return p, pidfd, nil
}

// confineThread gives up, for this thread and so for the child it clones, whatever exec could give back.
func confineThread() error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot set no_new_privs: %w", err)
	}
	// The daemon's timers may run late (osthread.SetTimerSlack), and who is cloned inherits that; a guest's may not.
	if err := unix.Prctl(unix.PR_SET_TIMERSLACK, osthread.DefaultTimerSlack, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot set the timer slack: %w", err)
	}
	for c := range uintptr(lastCapability + 1) {
		err := unix.Prctl(unix.PR_CAPBSET_DROP, c, 0, 0, 0)
		if errors.Is(err, unix.EINVAL) && c > unix.CAP_AUDIT_READ {
			break // past the kernel's last
		}
		if err != nil {
			return fmt.Errorf("cannot drop capability %d from the bounding set: %w", c, err)
		}
	}
	return nil
}

// killProcess ends the process that pidfd is of, and never another of its pid.
func killProcess(pidfd *os.File) error {
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var killErr error
	err = conn.Control(func(fd uintptr) { killErr = unix.PidfdSendSignal(int(fd), unix.SIGKILL, nil, 0) })
	if errors.Is(killErr, unix.ESRCH) {
		killErr = nil
	}
	return errors.Join(err, killErr)
}

// newPidfd lets the Go runtime wait for fd.
func newPidfd(fd int) (*os.File, error) {
	if fd < 0 {
		return nil, errors.New("the kernel gave no pidfd")
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("cannot prepare a pidfd: %w", err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// errGone: the process is not there any more.
var errGone = errors.New("the process is gone")

// open finds a process that an earlier daemon started.
func (p process) open() (*os.File, error) {
	if p.PID <= 0 {
		return nil, errGone
	}
	fd, err := unix.PidfdOpen(p.PID, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, errGone
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open process %d: %w", p.PID, err)
	}
	pidfd, err := newPidfd(fd)
	if err != nil {
		return nil, err
	}
	// Read after the open: if it is the right one now, the descriptor is of the right one.
	start, err := startTime(p.PID)
	if err == nil && start != p.StartTime || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		err = errGone
	}
	if err == nil && hasExited(uintptr(fd)) {
		err = errGone
	}
	if err != nil {
		return nil, errors.Join(err, pidfd.Close())
	}
	return pidfd, nil
}

// startTime reads field 22 of /proc/PID/stat. The second field is the name, in parentheses, with anything in it.
func startTime(pid int) (uint64, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return 0, err
	}
	fields := bytes.Fields(b[bytes.LastIndexByte(b, ')')+1:])
	const startTimeField = 22 - 3
	if len(fields) <= startTimeField {
		return 0, fmt.Errorf("cannot parse /proc/%d/stat", pid)
	}
	return strconv.ParseUint(string(fields[startTimeField]), 10, 64)
}

// exitStatus is how a process ended; known only to its parent.
type exitStatus struct {
	known  bool
	code   int
	signal syscall.Signal
}

func (s exitStatus) String() string {
	switch {
	case !s.known:
		return "ended, nobody knows how: sandboxd was restarted while it ran"
	case s.signal != 0:
		return fmt.Sprintf("was ended by signal %d (%v)", s.signal, s.signal)
	default:
		return fmt.Sprintf("exited with code %d", s.code)
	}
}

// waitExit returns when the process has ended (nil), and reaps it if it is our child; or when pidfd is closed or its
// deadline has passed.
func waitExit(pidfd *os.File) (status exitStatus, err error) {
	err = onExit(pidfd, func(fd uintptr) {
		var info unix.Siginfo
		err := unix.Waitid(unix.P_PIDFD, int(fd), &info, unix.WEXITED|unix.WNOHANG, nil)
		if err != nil || info.Signo == 0 {
			return // an earlier daemon's child
		}
		status.known = true
		// si_status: after three ints, padding to the union's alignment, si_pid and si_uid (siginfo_t of 64-bit Linux).
		n := *(*int32)(unsafe.Add(unsafe.Pointer(&info), 24))
		if info.Code == cldExited {
			status.code = int(n)
		} else {
			status.signal = syscall.Signal(n)
		}
	})
	return status, err
}

// cldExited is CLD_EXITED: the process called exit. Other codes are of signals.
const cldExited = 1

// onExit calls fn when the process has ended.
func onExit(pidfd *os.File, fn func(fd uintptr)) error {
	conn, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	// The runtime's poller says when to look again; on a pidfd "readable" means ended.
	return conn.Read(func(fd uintptr) bool {
		ended := hasExited(fd)
		if ended {
			fn(fd)
		}
		return ended
	})
}

func hasExited(pidfd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return err == nil && n == 1
	}
}
