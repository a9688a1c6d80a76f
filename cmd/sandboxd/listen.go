package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// socketMode lets root and the socket's group call, nobody else.
	socketMode = 0o660
	// answerTimeout is how long another daemon gets to accept before its socket counts as stale. The kernel accepts
	// for it as long as its backlog has room, so a living one answers at once.
	answerTimeout = 2 * time.Second
)

// listen opens the socket at path, or takes the one systemd passed. It returns the path it really is at.
func listen(path, group string) (net.Listener, string, error) {
	inherited, err := inheritedListener()
	if err != nil {
		return nil, "", err
	}
	if inherited != nil {
		return inherited, inherited.Addr().String(), nil
	}
	gid, err := groupID(group)
	if err != nil {
		return nil, "", err
	}
	dir := filepath.Dir(path)
	err = makeDir(dir)
	var open *othersWriteError
	if errors.As(err, &open) {
		// A sticky directory such as /tmp will not do either: whoever is there first takes the name, and clients talk to them.
		return nil, "", fmt.Errorf("cannot listen on %s: others than root can write to %s and could put a socket of theirs there: choose a --listen in a directory of its own, such as unix:///run/sandboxd/sandboxd.sock", path, dir)
	}
	if err != nil {
		return nil, "", err
	}
	if err := admitGroup(dir, gid); err != nil {
		return nil, "", err
	}
	if err := removeStale(path); err != nil {
		return nil, "", err
	}
	// The umask of main makes the socket 0600; it is opened to the group only once it belongs to it.
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, "", fmt.Errorf("cannot listen: %w", err)
	}
	if err := errors.Join(os.Lchown(path, 0, gid), os.Chmod(path, socketMode)); err != nil {
		return nil, "", errors.Join(fmt.Errorf("cannot give the socket to its group: %w", err), l.Close())
	}
	return l, path, nil
}

func groupID(name string) (int, error) {
	if name == "" {
		return 0, nil
	}
	if gid, err := strconv.Atoi(name); err == nil {
		return gid, nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, fmt.Errorf("cannot use --socket-group %q: %w: make it with groupadd --system %s", name, err, name)
	}
	return strconv.Atoi(g.Gid)
}

// admitGroup lets the socket's group through the socket's directory, and nobody else, where not everybody may pass.
func admitGroup(dir string, gid int) error {
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("cannot open the socket's directory to its group: %w", err)
	}
	if gid == 0 || info.Mode().Perm()&0o001 != 0 {
		return nil
	}
	if err := errors.Join(os.Chown(dir, 0, gid), os.Chmod(dir, info.Mode().Perm()|0o010)); err != nil {
		return fmt.Errorf("cannot open the socket's directory to its group: %w", err)
	}
	return nil
}

// removeStale removes the socket of a daemon that died, and nothing else.
func removeStale(path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot listen: %w", err)
	}
	if info.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("cannot listen on %s: there is something that is no socket: move it away or choose another --listen", path)
	}
	conn, err := net.DialTimeout("unix", path, answerTimeout)
	if err == nil {
		conn.Close()
		return fmt.Errorf("cannot listen on %s: another daemon answers there: stop it or choose another --listen", path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("cannot listen on %s: cannot tell whether another daemon answers there: %w", path, err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("cannot remove the socket a daemon left behind: %w", err)
	}
	return nil
}
