package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// makeDir makes a directory only root can enter, its parents as others make them. One that exists must be a real
// directory of root's that nobody else can write to: whoever can put a symbolic link or a file there could have root
// write where they like. (What lies below holds its own at 0700; systemd's RuntimeDirectory itself is 0755, so that the
// socket's group reaches the socket.)
func makeDir(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("cannot make directory: %w", err)
	}
	if err := os.Mkdir(path, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("cannot make directory: %w", err)
	}
	return checkDir(path)
}

func checkDir(path string) error {
	if weaken.Without("check directories") {
		return nil
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot use directory %s: it must be a directory and no symbolic link: %w", path, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("cannot use directory %s: %w", path, err)
	}
	if st.Uid != 0 || st.Mode&0o022 != 0 {
		return &othersWriteError{path: path, uid: st.Uid, mode: st.Mode & 0o7777}
	}
	return nil
}

// othersWriteError is about a directory that others than root can write to.
type othersWriteError struct {
	path string
	uid  uint32
	mode uint32
}

func (e *othersWriteError) Error() string {
	return fmt.Sprintf("cannot use directory %s: it belongs to user %d with mode %04o, and only root may be able to write to it: run chown root %s && chmod go-w %s",
		e.path, e.uid, e.mode, e.path, e.path)
}

// lockDir makes sure that this is the only daemon to use a directory, for as long as the file it returns is open. The
// kernel drops the lock when the daemon dies, however it does.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot lock %s: %w", dir, err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		defer f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, fmt.Errorf("cannot use %s: another sandboxd%s uses it: stop that one, or give this one a --state-dir and a --run-dir of its own", dir, holder(f))
		}
		return nil, fmt.Errorf("cannot lock %s: %w", dir, err)
	}
	// Only for people and for the message above; the lock is what counts.
	if err := errors.Join(f.Truncate(0), write(f, strconv.Itoa(os.Getpid())+"\n")); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot write %s: %w", path, err), f.Close())
	}
	return f, nil
}

func write(f *os.File, s string) error {
	_, err := f.WriteAt([]byte(s), 0)
	return err
}

// holder is what a lock file says about who holds it.
func holder(f *os.File) string {
	var buf [16]byte
	n, _ := f.ReadAt(buf[:], 0)
	pid, err := strconv.Atoi(strings.TrimSpace(string(buf[:n])))
	if err != nil {
		return ""
	}
	return fmt.Sprintf(" (pid %d)", pid)
}
