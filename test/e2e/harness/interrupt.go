package harness

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// made are all daemons of the test, for when it is interrupted.
var made madeDaemons

type madeDaemons struct {
	sync.Mutex
	all []*Daemon
}

func (m *madeDaemons) add(d *Daemon) {
	m.Lock()
	defer m.Unlock()
	m.all = append(m.all, d)
}

// removeGroups removes the groups of d's killed workloads as the kernel lets go of them.
func removeGroups(d *Daemon) {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	for deadline := time.Now().Add(SettleTimeout); time.Now().Before(deadline); <-tick.C {
		groups, err := listCgroups(d)
		if err != nil || len(groups) == 0 {
			return
		}
		for _, g := range groups {
			_ = os.Remove(g)
		}
	}
}

// cleanUpOnSignal has an interrupted test take along what it started: daemons leave their workloads alive by design.
func cleanUpOnSignal() {
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	// Lives as long as the process does.
	go func() {
		s := <-interrupted
		// Daemons first, so that nobody starts what we just killed; then again, for what was being started meanwhile.
		made.Lock()
		for _, d := range made.all {
			if d.Running() {
				_ = d.Cmd.Process.Kill()
			}
		}
		var errs []error
		for range 3 {
			for _, p := range descendants() {
				_ = unix.Kill(p.pid, unix.SIGKILL)
			}
			reapOrphans()
		}
		for _, d := range made.all {
			removeGroups(d)
			errs = append(errs, d.Discard())
		}
		fmt.Fprintf(os.Stderr, "e2e: ended by %s; cleaning up: %v\n", s, errors.Join(append(errs, os.RemoveAll(idDir))...))
		os.Exit(1)
	}()
}
