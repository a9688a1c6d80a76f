package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// errProcessGone: the process of a record has ended, and its number may be another's.
var errProcessGone = errors.New("process has ended")

// startTimeField is the field of /proc/PID/stat (proc_pid_stat(5), counted from 1) that tells processes of one number
// apart: clock ticks between boot and start.
const startTimeField = 22

const (
	// reapTimeout bounds how long a process that has ended is waited for to be reaped: by the spawner at once, by an init
	// (after the daemon that started it has ended) perhaps only when that looks again, every two seconds.
	reapTimeout = 3 * time.Second
	// reapPause paces it.
	reapPause = 100 * time.Microsecond
)

// processStartTime reads a process's start time.
func processStartTime(pid int) (uint64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, errProcessGone
	}
	if err != nil {
		return 0, fmt.Errorf("cannot identify process %d: %w", pid, err)
	}
	// Field 2 is the command in parentheses and may itself hold blanks and parentheses.
	_, rest, ok := strings.Cut(string(b[max(0, strings.LastIndexByte(string(b), ')')):]), ") ")
	fields := strings.Fields(rest)
	const after = 3 // rest starts with field 3
	if !ok || len(fields) <= startTimeField-after {
		return 0, fmt.Errorf("cannot identify process %d: malformed stat", pid)
	}
	t, err := strconv.ParseUint(fields[startTimeField-after], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("cannot identify process %d: %w", pid, err)
	}
	return t, nil
}

// openProcess opens the running process that had this number and start time, errProcessGone if it runs no more.
func openProcess(pid int, startTime uint64) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) {
		return nil, errProcessGone
	}
	if err != nil {
		return nil, fmt.Errorf("cannot open process %d: %w", pid, err)
	}
	f := os.NewFile(uintptr(fd), "pidfd:"+strconv.Itoa(pid))
	// The descriptor is for one process from now on: if that one has the right start time, it is the right one.
	t, err := processStartTime(pid)
	if err == nil && (t != startTime || ended(f)) {
		err = errProcessGone
	}
	if err != nil {
		_ = f.Close() // nothing was done with it
		return nil, err
	}
	return f, nil
}

// ended reports whether the process behind a pidfd runs no more, reaped or not.
func ended(pidfd *os.File) bool {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return true
	}
	done := true
	err = raw.Control(func(fd uintptr) { done = readable(fd) })
	return err != nil || done
}

func readable(fd uintptr) bool {
	p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(p, 0)
		if !errors.Is(err, unix.EINTR) {
			return err != nil || n > 0
		}
	}
}

// waitProcess blocks until the process behind a pidfd has ended, and reaps it if it is the caller's child. It costs no thread:
// the descriptor waits in the Go runtime's poller. False when the descriptor was closed before.
func waitProcess(pidfd *os.File) bool {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return false
	}
	if err := raw.Read(readable); err != nil {
		return false
	}
	_ = raw.Control(func(fd uintptr) {
		// ECHILD where another process is the parent: the spawner, or init.
		_ = unix.Waitid(unix.P_PIDFD, int(fd), nil, unix.WEXITED|unix.WNOHANG, nil)
	})
	return true
}

// waitReaped waits a bounded time until an ended process is a zombie no more. A zombie holds nothing but its number and its
// name in lists, so it is no error if init never reaps it.
func waitReaped(ctx context.Context, pidfd *os.File) {
	ctx, cancel := context.WithTimeout(ctx, reapTimeout)
	defer cancel()
	for signalProcess(pidfd, 0) == nil {
		select {
		case <-ctx.Done():
			return
		case <-time.After(reapPause):
		}
	}
}

// signalProcess sends a signal to the process behind a pidfd; 0 only asks whether it has been reaped.
func signalProcess(pidfd *os.File, signal unix.Signal) error {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var serr error
	if err := raw.Control(func(fd uintptr) { serr = unix.PidfdSendSignal(int(fd), signal, nil, 0) }); err != nil {
		return err
	}
	return serr
}

// waitClosed waits for a channel or for ctx.
func waitClosed(ctx context.Context, c <-chan struct{}) error {
	select {
	case <-c:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
