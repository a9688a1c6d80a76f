package main

import (
	"context"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) rmCommand() *cobra.Command {
	var force bool
	cmd := &cobra.Command{
		Use:   "rm [flags] WORKLOAD...",
		Short: "Delete workloads with their logs and what they wrote",
		Example: `  sandboxctl rm web
  sandboxctl rm -f $(sandboxctl ps -aq)`,
		Args: minArgs(1, "WORKLOAD"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			return a.each(ctx, args, func(ref string) (proto.Message, error) {
				_, err := c.Workloads.DeleteWorkload(ctx, &sandboxdv1.DeleteWorkloadRequest{Id: ref, Force: force})
				return nil, err
			})
		}),
	}
	boolFlag(cmd.Flags(), &force, "force", "f", "kill them first if they run")
	return cmd
}
