package main

import (
	"context"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) startCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "start WORKLOAD...",
		Short:   "Start workloads that were created or have ended",
		Example: `  sandboxctl start web`,
		Args:    minArgs(1, "WORKLOAD"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			return a.each(ctx, args, func(ref string) (proto.Message, error) {
				r, err := c.Workloads.StartWorkload(ctx, &sandboxdv1.StartWorkloadRequest{Id: ref})
				return r.GetWorkload(), err
			})
		}),
	}
}
