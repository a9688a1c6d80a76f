package main

import (
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// What systemd and a service say to each other: sd_listen_fds(3) and sd_notify(3).

// firstInherited is the first descriptor that systemd passes: SD_LISTEN_FDS_START.
const firstInherited = 3

// inheritedListener is the socket systemd passed; nil when it passed none.
func inheritedListener() (net.Listener, error) {
	pid, fds := os.Getenv("LISTEN_PID"), os.Getenv("LISTEN_FDS")
	// They are for this process alone, not for what it starts.
	for _, name := range []string{"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"} {
		os.Unsetenv(name)
	}
	if pid != strconv.Itoa(os.Getpid()) || fds == "" || fds == "0" {
		return nil, nil
	}
	if fds != "1" {
		return nil, fmt.Errorf("cannot use %s sockets from systemd: sandboxd answers on one; give its .socket unit one ListenStream=", fds)
	}
	unix.CloseOnExec(firstInherited)
	file := os.NewFile(firstInherited, "systemd socket")
	defer file.Close()
	l, err := net.FileListener(file)
	if err != nil {
		return nil, fmt.Errorf("cannot use the socket from systemd: %w", err)
	}
	ul, ok := l.(*net.UnixListener)
	if !ok {
		l.Close()
		return nil, fmt.Errorf("cannot use the socket from systemd: %s is no Unix stream socket, and callers are known only on those", l.Addr())
	}
	// It is systemd's, and there to be used again by the next start.
	ul.SetUnlinkOnClose(false)
	return ul, nil
}

// notifier tells systemd how the service fares; without systemd it does nothing.
type notifier struct{ address string }

// newNotifier takes the address out of the environment: what the daemon starts must not speak for it.
func newNotifier() notifier {
	address := os.Getenv("NOTIFY_SOCKET")
	os.Unsetenv("NOTIFY_SOCKET")
	return notifier{address: address}
}

func (n notifier) send(state ...string) error {
	if n.address == "" {
		return nil
	}
	// A leading @ stands for the NUL of an abstract address, also to package net.
	conn, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: n.address, Net: "unixgram"})
	if err != nil {
		return fmt.Errorf("cannot tell systemd %s: %w", state[0], err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte(strings.Join(state, "\n"))); err != nil {
		return fmt.Errorf("cannot tell systemd %s: %w", state[0], err)
	}
	return nil
}
