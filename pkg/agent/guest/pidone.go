package guest

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// pidOne is what both real walls have in common: the agent is PID 1, so every process is its to signal and to reap.
type pidOne struct {
	*stages
}

func newPidOne() pidOne { return pidOne{newStages(newChildren())} }

// errNotPidOne keeps kill(-1) from ever being sent by a process that is not PID 1.
var errNotPidOne = errors.New("cannot run: the agent is not PID 1")

func checkPidOne() error {
	if os.Getpid() != 1 {
		return errNotPidOne
	}
	return nil
}

func (w pidOne) signal(p *process, sig syscall.Signal) error {
	if p.pid == 0 {
		return errEnded
	}
	return w.children.signal(p.pid, sig)
}

// signalAll reaches everything in the pid namespace but PID 1 itself.
func (w pidOne) signalAll(sig syscall.Signal) error {
	if err := checkPidOne(); err != nil {
		return err
	}
	return unix.Kill(-1, sig)
}

// gone: PID 1 inherits every orphan, so it has no children exactly when it is alone.
func (w pidOne) gone() bool {
	w.children.reapEnded()
	err := unix.Waitid(unix.P_ALL, 0, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil)
	return errors.Is(err, unix.ECHILD)
}

// ignored are the signals that would otherwise end the agent. What it starts has them by default again (rawfork.ResetSignals), or is
// the agent's own program, which handles them.
var ignored = []os.Signal{
	unix.SIGHUP, unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGUSR1, unix.SIGUSR2, unix.SIGALRM, unix.SIGPIPE, unix.SIGABRT,
}

// unheard are those that Go's runtime does not let a program ignore, for its own faults send them, which end the agent all the same. One
// sent by kill(2) goes to a handler that nobody listens to. (All signals could, but for each that may be ignored the runtime goes to a
// thread of its own and back.)
var unheard = []os.Signal{unix.SIGSEGV, unix.SIGBUS, unix.SIGFPE, unix.SIGILL, unix.SIGTRAP, unix.SIGSYS, unix.SIGSTKFLT}

// run reaps until ctx is done. No other signal does anything to the agent.
func (w pidOne) run(ctx context.Context) {
	nobody := make(chan os.Signal, 1)
	if !weaken.Without("take signals") {
		signal.Ignore(ignored...)
		defer signal.Reset(ignored...)
		signal.Notify(nobody, unheard...)
		defer signal.Stop(nobody)
	}
	w.children.reapAll(ctx)
}
