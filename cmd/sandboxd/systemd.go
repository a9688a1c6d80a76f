package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"time"

	"go.uber.org/zap"
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

// watchdogInterval is how often systemd wants to hear that the daemon is alive: a third of what it allows, as
// sd_watchdog_enabled(3) advises half at most. 0 when it does not ask.
func watchdogInterval() (time.Duration, error) {
	usec, pid := os.Getenv("WATCHDOG_USEC"), os.Getenv("WATCHDOG_PID")
	os.Unsetenv("WATCHDOG_USEC")
	os.Unsetenv("WATCHDOG_PID")
	if usec == "" || (pid != "" && pid != strconv.Itoa(os.Getpid())) {
		return 0, nil
	}
	n, err := strconv.ParseInt(usec, 10, 64)
	if err != nil || n < 3 || n > int64(24*time.Hour/time.Microsecond) {
		return 0, fmt.Errorf("cannot use WATCHDOG_USEC=%q: it is microseconds, between 3 and a day's: mend WatchdogSec= of the unit", usec)
	}
	return time.Duration(n) * time.Microsecond / 3, nil
}

// keepAlive tells systemd every so often that the daemon is alive, as long as alive returns. One that hangs for ever, on a
// lock that nobody gives back, is then ended by systemd with the stacks of its goroutines in the log, and started anew.
func (n notifier) keepAlive(ctx context.Context, every time.Duration, alive func(), log *zap.Logger) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		alive()
		if err := n.send("WATCHDOG=1"); err != nil {
			log.Warn("systemd does not know that this daemon is alive", zap.Error(err))
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}
