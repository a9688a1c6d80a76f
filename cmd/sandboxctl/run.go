package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) runCommand() *cobra.Command {
	var flags createFlags
	var detach, remove bool
	cmd := &cobra.Command{
		Use:   "run [flags] IMAGE [COMMAND [ARG...]]",
		Short: "Create and start a workload; exit with its code",
		Long: `Run creates a workload, attaches to it and starts it, passes on signals, and exits with the process's code. What follows
IMAGE belongs to the command. The workload stays, for logs and inspect, unless --rm is given.`,
		Example: `  sandboxctl run --rm debian uname -r
  sandboxctl run --rm -it --isolation vm debian bash
  tar c . | sandboxctl run --rm -i debian tar t
  sandboxctl run -d --rm debian ./report-to-somebody
  sandboxctl run -d --name web --cpus 0.5 --memory 128m debian python3 -m http.server`,
		Args: minArgs(1, "IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			request, err := flags.request(args[0], args[1:])
			if err != nil {
				return err
			}
			if flags.tty {
				request.Spec.Process.TerminalSize = terminalOf(a.stdin).size()
			}
			if detach {
				return a.call(func(ctx context.Context, c *client.Client, _ []string) error {
					if remove {
						return a.runRemoved(ctx, c, request)
					}
					return a.runDetached(ctx, c, request)
				})(cmd, args)
			}
			c, err := a.dial()
			if err != nil {
				return err
			}
			defer c.Close()
			return a.runForeground(cmd.Context(), c, request, remove)
		},
	}
	flags.register(cmd.Flags())
	flags.registerKey(cmd.Flags())
	boolFlag(cmd.Flags(), &detach, "detach", "d", "print the id and leave it running")
	cmd.Flags().BoolVar(&remove, "rm", false, "delete the workload when it has ended, or when this program is interrupted; with -d the daemon does, logs and all")
	cmd.Flags().SetInterspersed(false)
	return cmd
}

func (a *app) runDetached(ctx context.Context, c *client.Client, request *sandboxdv1.CreateWorkloadRequest) error {
	created, err := c.Workloads.CreateWorkload(ctx, request)
	if err != nil {
		return err
	}
	// Also when the start fails: the workload is there and says why.
	id := created.GetWorkload().GetId()
	if !a.json() {
		if _, err := fmt.Fprintln(a.stdout, id); err != nil {
			return err
		}
	}
	w := created.GetWorkload()
	if !client.Begun(w) {
		started, err := c.Workloads.StartWorkload(ctx, &sandboxdv1.StartWorkloadRequest{Id: id})
		if err != nil {
			return err
		}
		w = started.GetWorkload()
	}
	if a.json() {
		return a.printJSON(w)
	}
	return nil
}

// runRemoved is runDetached of a workload that the daemon removes when it has ended, or could not be started.
func (a *app) runRemoved(ctx context.Context, c *client.Client, r *sandboxdv1.CreateWorkloadRequest) error {
	answers, err := c.Workloads.RunWorkload(ctx, &sandboxdv1.RunWorkloadRequest{
		Name: r.GetName(), Labels: r.GetLabels(), Spec: r.GetSpec(), IdempotencyKey: r.GetIdempotencyKey(),
		RemoveWhenEnded: true, Detach: true,
	})
	if err != nil {
		return err
	}
	started, err := answers.Recv()
	if err != nil {
		return err
	}
	if a.json() {
		return a.printJSON(started.GetWorkload())
	}
	_, err = fmt.Fprintln(a.stdout, started.GetWorkload().GetId())
	return err
}

func (a *app) runForeground(ctx context.Context, c *client.Client, request *sandboxdv1.CreateWorkloadRequest, remove bool) error {
	var id string
	process := request.GetSpec().GetProcess()
	s := a.newSession(ctx, process.GetTerminal(), process.GetStdin(), func(ctx context.Context, _ *client.Process, name string) error {
		return killWorkload(ctx, c, id, name)
	})
	defer s.close()
	var rawErr error
	exit, err := c.Run(s.ctx, request, client.RunOptions{
		Stdio:  a.stdio(process.GetStdin()),
		Remove: remove,
		Started: func(w *sandboxdv1.Workload, p *client.Process) {
			id = w.GetId()
			rawErr = s.start(p)
		},
	})
	s.terminal.restore()
	err = errors.Join(err, rawErr)
	if exit == nil {
		return orSignal(s.ctx, err)
	}
	// What went wrong beside it does not change how the process ended.
	if err != nil {
		fmt.Fprintln(a.stderr, errorText(err))
	}
	return processExit(exit.GetCode())
}

// killWorkload sends a signal past the streams: they may be held back by a process that does not read.
func killWorkload(ctx context.Context, c *client.Client, id, signal string) error {
	_, err := c.Workloads.KillWorkload(ctx, &sandboxdv1.KillWorkloadRequest{Id: id, Signal: signal})
	return err
}

// stdio connects a process to this program's streams.
func (a *app) stdio(stdin bool) client.Stdio {
	var in io.Reader
	if stdin {
		in = a.stdin
	}
	return client.Stdio{Stdin: in, Stdout: a.stdout, Stderr: a.stderr}
}
