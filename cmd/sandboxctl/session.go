package main

import (
	"context"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/sandboxd/sandboxd/pkg/client"
)

const (
	// signalTimeout is what a signal gets to reach the process before it counts as stuck behind input nobody reads.
	signalTimeout = 5 * time.Second
	// patience is how many requests to end are passed on before this program ends by itself, as docker does.
	patience = 3
)

// forwarded are the signals that go on to the process in the sandbox. The others concern this program alone.
var forwarded = []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2}

// session is this program's part while it stands in for a process in a sandbox: it passes on signals and the terminal's
// size, and keeps the local terminal raw while what is typed goes to the process.
type session struct {
	ctx    context.Context
	cancel context.CancelCauseFunc

	signals chan os.Signal
	stop    chan struct{}
	stopped chan struct{}
	started chan *client.Process

	terminal *terminal
	// Whether what is typed goes to the process. Otherwise the terminal keeps making signals of keys: nobody else would.
	stdin bool
	// Sends a signal, by number, to the process.
	signal func(ctx context.Context, p *client.Process, name string) error
}

// newSession catches signals from now on. Until started is called one of them ends the session's context; an end that
// comes from a signal is told by the context's cause. tty and stdin say what the process has.
func (a *app) newSession(ctx context.Context, tty, stdin bool, send func(context.Context, *client.Process, string) error) *session {
	s := &session{
		signals: make(chan os.Signal, 16), stop: make(chan struct{}), stopped: make(chan struct{}),
		started: make(chan *client.Process, 1), terminal: &terminal{}, stdin: stdin, signal: send,
	}
	if tty {
		s.terminal = terminalOf(a.stdin)
	}
	s.ctx, s.cancel = context.WithCancelCause(ctx)
	signal.Notify(s.signals, forwarded...)
	if s.terminal.is {
		signal.Notify(s.signals, syscall.SIGWINCH)
	}
	go s.loop()
	return s
}

// start begins to pass things on to a process that now runs.
func (s *session) start(p *client.Process) error {
	s.started <- p
	if !s.stdin {
		return nil
	}
	return s.terminal.makeRaw()
}

// close restores the terminal and lets go of the signals.
func (s *session) close() {
	s.terminal.restore()
	signal.Stop(s.signals)
	close(s.stop)
	s.cancel(nil)
	<-s.stopped
}

func (s *session) loop() {
	defer close(s.stopped)
	var p *client.Process
	ends := 0
	for {
		select {
		case <-s.stop:
			return
		case p = <-s.started:
			// It may have changed since the process was asked for.
			s.resize(p)
		case sig := <-s.signals:
			if sig == syscall.SIGWINCH {
				s.resize(p)
				continue
			}
			if asksToEnd(sig) {
				ends++
			}
			if p == nil || ends >= patience || !s.pass(p, sig) {
				s.cancel(signalExit(sig))
				return
			}
		}
	}
}

func asksToEnd(s os.Signal) bool {
	return s == syscall.SIGINT || s == syscall.SIGTERM || s == syscall.SIGHUP || s == syscall.SIGQUIT
}

// pass sends a signal on. It reports false when that did not work and the signal asked to end: then this program ends.
func (s *session) pass(p *client.Process, sig os.Signal) bool {
	number, ok := sig.(syscall.Signal)
	if !ok {
		return true
	}
	ctx, cancel := context.WithTimeout(s.ctx, signalTimeout)
	defer cancel()
	err := s.signal(ctx, p, strconv.Itoa(int(number)))
	select {
	case <-p.Done():
		// It has ended by itself; its exit code is on the way.
		return true
	default:
	}
	return err == nil || !asksToEnd(sig)
}

func (s *session) resize(p *client.Process) {
	size := s.terminal.size()
	if p == nil || size == nil {
		return
	}
	ctx, cancel := context.WithTimeout(s.ctx, signalTimeout)
	defer cancel()
	// A window of the wrong size is no reason to end.
	_ = p.Resize(ctx, size.GetRows(), size.GetColumns())
}
