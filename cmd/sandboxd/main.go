// Command sandboxd is the daemon: it answers the API on a Unix socket and runs workloads in containers and microVMs.
// This is the only program that knows which runtimes there are.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	goruntime "runtime"
	"syscall"

	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "sandboxd:", err)
		os.Exit(1)
	}
}

func run(args []string, stdout io.Writer) error {
	c, flags, err := parseConfig(args)
	if errors.Is(err, pflag.ErrHelp) || c.help {
		return usage(stdout, flags)
	}
	if err != nil {
		return err
	}
	if c.version {
		_, err := fmt.Fprintf(stdout, "sandboxd %s (commit %s, %s, agent protocol %d)\n", spec.Version, spec.Commit, goruntime.Version(), spec.ProtocolVersion)
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("cannot start: sandboxd needs root to make mounts, cgroups and namespaces for others: run it as root, or let systemd start it (systemctl start sandboxd)")
	}
	log, err := newLogger(c.logLevel, c.logFormat)
	if err != nil {
		return err
	}
	// Nothing this process makes is for others unless it says so.
	unix.Umask(0o077)

	// SIGTERM and SIGINT end the daemon and leave the workloads alone; a second one ends it without grace. SIGHUP has
	// nothing to reload and must not end it with the terminal it was started from.
	signal.Ignore(syscall.SIGHUP)
	ctx, restore := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer restore()
	context.AfterFunc(ctx, restore)
	return serve(ctx, c, log)
}

func usage(w io.Writer, flags *pflag.FlagSet) error {
	_, err := fmt.Fprintf(w, `sandboxd runs workloads as containers or microVMs, as its policy decides, and answers on a Unix socket.

Usage:
  sandboxd [flags]

Examples:
  sandboxd --policy /etc/sandboxd/policy.yaml
  sandboxd --listen unix:///tmp/one/sandboxd.sock --state-dir /tmp/one/state --run-dir /tmp/one/run --vm-accel auto

Flags:
%s`, flags.FlagUsagesWrapped(100))
	return err
}

// serve runs the daemon until ctx is done.
func serve(ctx context.Context, c config, log *zap.Logger) (err error) {
	notify := newNotifier()
	d, err := start(ctx, c, log)
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		log.Info("stopped before it was ready")
		return nil
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()

	served := make(chan error, 1)
	go func() { served <- d.server.Serve(d.listener) }()
	if err := notify.send("READY=1", "STATUS=answering on "+d.socket); err != nil {
		log.Warn("systemd does not know that this daemon is ready", zap.Error(err))
	}
	log.Info("ready", zap.String("address", "unix://"+d.socket), zap.String("version", spec.Version), zap.Int("pid", os.Getpid()))

	select {
	case err = <-served:
		// Nobody asked it to end.
		return fmt.Errorf("cannot go on: %w", errors.Join(err, errors.New("the listener has ended")))
	case <-ctx.Done():
	}
	log.Info("stopping; workloads go on running")
	if err := notify.send("STOPPING=1"); err != nil {
		log.Warn("systemd does not know that this daemon stops", zap.Error(err))
	}
	d.server.Stop()
	return <-served
}
