// Command sandboxd is the daemon: it answers the API on a Unix socket, and over TCP, and runs workloads in containers and microVMs.
// This is the only program that knows which runtimes there are.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	goruntime "runtime"
	"syscall"

	"github.com/spf13/pflag"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/osthread"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// timerSlack is for the daemon what container.agentTimerSlack is for an agent: its own timers are of milliseconds and more.
const timerSlack = 500_000

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
	if c.man {
		return manual(flags).Write(stdout)
	}
	if c.version {
		_, err := fmt.Fprintf(stdout, "sandboxd %s (commit %s, %s, agent protocol %d)\n", spec.Version, spec.Commit, goruntime.Version(), spec.ProtocolVersion)
		return err
	}
	if err := osthread.SetTimerSlack(timerSlack); err != nil {
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

	// SIGTERM and SIGINT end the daemon and leave the workloads alone; a second one ends it without grace. SIGHUP,
	// which also comes when the terminal it was started from goes, reads files again and never ends it.
	hangup := make(chan os.Signal, 1)
	signal.Notify(hangup, syscall.SIGHUP)
	ctx, restore := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer restore()
	context.AfterFunc(ctx, restore)
	return serve(ctx, c, log, hangup)
}

// serve runs the daemon until ctx is done.
func serve(ctx context.Context, c config, log *zap.Logger, hangup <-chan os.Signal) (err error) {
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

	listeners := append([]net.Listener{d.listener}, d.remote...)
	served := make(chan error, len(listeners))
	for _, l := range listeners {
		go func() { served <- d.server.Serve(l) }()
	}
	beat, stopBeat := context.WithCancel(ctx)
	defer stopBeat()
	every, err := watchdogInterval()
	if err != nil {
		return err
	}
	if every > 0 {
		go notify.keepAlive(beat, every, d.alive, log)
	}
	if err := notify.send("READY=1", "STATUS=answering on "+d.socket); err != nil {
		log.Warn("systemd does not know that this daemon is ready", zap.Error(err))
	}
	log.Info("ready", zap.String("address", "unix://"+d.socket), zap.Int("tcp_addresses", len(d.remote)), zap.String("version", spec.Version), zap.Int("pid", os.Getpid()))

	if err := untilStopped(ctx, d, log, hangup, served); err != nil {
		return err
	}
	log.Info("stopping; workloads go on running")
	if err := notify.send("STOPPING=1"); err != nil {
		log.Warn("systemd does not know that this daemon stops", zap.Error(err))
	}
	d.server.Stop()
	var errs []error
	for range listeners {
		errs = append(errs, <-served)
	}
	return errors.Join(errs...)
}

func untilStopped(ctx context.Context, d *daemon, log *zap.Logger, hangup <-chan os.Signal, served <-chan error) error {
	for {
		select {
		case err := <-served:
			// Nobody asked it to end.
			return fmt.Errorf("cannot go on: %w", errors.Join(err, errors.New("the listener has ended")))
		case <-ctx.Done():
			return nil
		case <-hangup:
			if err := d.reload(); err != nil {
				log.Error("what was read again cannot be used; what was read before holds", zap.Error(err))
				continue
			}
			log.Info("read access file and certificates again")
		}
	}
}
