package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/sandboxd/sandboxd/pkg/client"
)

// Exit codes other than the process's own, as docker and shells have them.
const (
	exitNo            = 1   // a check answered no: doctor, policy check
	exitError         = 125 // the command line, the daemon or the request is at fault
	exitNotExecutable = 126
	exitNotFound      = 127
	exitSignal        = 128 // plus the signal
)

// exitStatus is an error that only says with what code to exit; whoever made it has said the rest.
type exitStatus int

func (e exitStatus) Error() string { return fmt.Sprintf("exit status %d", int(e)) }

// processExit is how a command ends whose process ended with a code.
func processExit(code int32) error {
	if code == 0 {
		return nil
	}
	return exitStatus(code)
}

// exitCode is the code an error ends the program with.
func exitCode(err error) int {
	var status exitStatus
	switch {
	case err == nil:
		return 0
	case errors.As(err, &status):
		return int(status)
	}
	switch client.ErrorReason(err) {
	case client.ReasonProcessNotFound:
		return exitNotFound
	case client.ReasonProcessNotExecutable:
		return exitNotExecutable
	}
	return exitError
}

// errorText is what to print of an error, a line for each that was joined: nothing for an exit status.
func errorText(err error) string {
	if err == nil {
		return ""
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		var lines []string
		for _, e := range joined.Unwrap() {
			if line := errorText(e); line != "" {
				lines = append(lines, line)
			}
		}
		return strings.Join(lines, "\n")
	}
	var status exitStatus
	if errors.As(err, &status) {
		return ""
	}
	// One line whatever is in it: it may quote what came out of a sandbox.
	return "sandboxctl: " + strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		return printable(r)
	}, err.Error())
}

// interruptible is a context that ends with the first signal that asks the program to end.
func interruptible(ctx context.Context) (context.Context, func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	done := make(chan struct{})
	go func() {
		select {
		case s := <-signals:
			// A second one ends the program the hard way.
			signal.Stop(signals)
			cancel(signalExit(s))
		case <-done:
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(done)
		cancel(nil)
	}
}

// signalExit is the exit status of a program that a signal ended.
func signalExit(s os.Signal) exitStatus {
	if n, ok := s.(syscall.Signal); ok {
		return exitSignal + exitStatus(n)
	}
	return exitError
}

// orSignal is err, unless it is only the consequence of a signal.
func orSignal(ctx context.Context, err error) error {
	var status exitStatus
	if ctx.Err() != nil && errors.As(context.Cause(ctx), &status) {
		return status
	}
	return err
}
