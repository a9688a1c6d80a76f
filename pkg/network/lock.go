package network

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// When a daemon is killed while a plugin runs, the plugin goes on: a DEL of the next daemon beside it would take away what is
// not there yet. So each plugin is started with the workload's lock open and taken, and so are the programs it starts: flock(2)
// belongs to the open file, which they share, and is free when the last of them has ended.

const (
	lockFile = "lock"
	// orphanGrace is how long plugins of a daemon that died may take to finish. Most need a tenth of a second.
	orphanGrace = 10 * time.Second
	// orphanEnd is how long killed ones may take to be gone.
	orphanEnd = 5 * time.Second
	// lockPause paces the wait.
	lockPause = 10 * time.Millisecond
)

// takeLock takes the lock of a workload's directory. Whoever still has it after grace is killed.
func takeLock(ctx context.Context, dir string, grace time.Duration) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, lockFile), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open the plugins' lock: %w", err)
	}
	for _, limit := range []time.Duration{grace, orphanEnd} {
		taken, err := tryLock(ctx, f, limit)
		if err != nil {
			_ = f.Close() // nothing was done with it
			return nil, err
		}
		if taken {
			return f, nil
		}
		killHolders(f)
	}
	_ = f.Close() // nothing was done with it
	return nil, errors.New("cannot wait for plugins of an earlier sandboxd: they do not end, even killed")
}

func tryLock(ctx context.Context, f *os.File, limit time.Duration) (bool, error) {
	for deadline := time.Now().Add(limit); ; {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return true, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			return false, fmt.Errorf("cannot take the plugins' lock: %w", err)
		}
		if time.Now().After(deadline) {
			return false, nil
		}
		select {
		case <-time.After(lockPause):
		case <-ctx.Done():
			return false, fmt.Errorf("cannot wait for plugins that still run: %w", context.Cause(ctx))
		}
	}
}

// killHolders kills every other process that has the lock's file open: a plugin, or what one has started.
func killHolders(lock *os.File) {
	var want unix.Stat_t
	if unix.Fstat(int(lock.Fd()), &want) != nil {
		return
	}
	processes, _ := os.ReadDir("/proc") // those it lists; the lock says whether it was enough
	for _, p := range processes {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		// First the process, then the look at it: the number may become another's in between.
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		if hasOpen(pid, want) {
			_ = unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		}
		_ = unix.Close(fd)
	}
}

func hasOpen(pid int, want unix.Stat_t) bool {
	files, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, f := range files {
		var st unix.Stat_t
		if unix.Stat(f, &st) == nil && st.Dev == want.Dev && st.Ino == want.Ino {
			return true
		}
	}
	return false
}
