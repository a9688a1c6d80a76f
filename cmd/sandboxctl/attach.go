package main

import (
	"context"

	"github.com/spf13/cobra"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) attachCommand() *cobra.Command {
	var noStdin bool
	cmd := &cobra.Command{
		Use:   "attach [flags] WORKLOAD",
		Short: "Connect to a workload's own process; exit with its code",
		Long: `Attach shows what the process writes from now on, passes on signals and, if the workload was created with -i, standard
input, and exits with the process's code. It may be called before the start.`,
		Example: `  sandboxctl create -it --name shell debian bash
  sandboxctl start shell && sandboxctl attach shell`,
		Args: exactArgs(1, "WORKLOAD"),
		RunE: func(cmd *cobra.Command, args []string) error {
			c, err := a.dial()
			if err != nil {
				return err
			}
			defer c.Close()
			return a.attach(cmd.Context(), c, args[0], noStdin)
		},
	}
	cmd.Flags().BoolVar(&noStdin, "no-stdin", false, "do not pass on standard input")
	return cmd
}

func (a *app) attach(ctx context.Context, c *client.Client, ref string, noStdin bool) error {
	found, err := c.Workloads.GetWorkload(ctx, &sandboxdv1.GetWorkloadRequest{Id: ref})
	if err != nil {
		return err
	}
	id, process := found.GetWorkload().GetId(), found.GetWorkload().GetSpec().GetProcess()
	stdin := process.GetStdin() && !noStdin
	s := a.newSession(ctx, process.GetTerminal(), stdin, func(ctx context.Context, _ *client.Process, name string) error {
		return killWorkload(ctx, c, id, name)
	})
	defer s.close()
	p, err := c.Attach(s.ctx, &sandboxdv1.AttachStart{Id: id}, a.stdio(stdin))
	if err != nil {
		return orSignal(s.ctx, err)
	}
	defer p.Close()
	return a.follow(s, p)
}
