package main

import (
	"context"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) killCommand() *cobra.Command {
	var signal string
	cmd := &cobra.Command{
		Use:     "kill [flags] WORKLOAD...",
		Short:   "Send a signal to the process of workloads",
		Example: `  sandboxctl kill --signal HUP web`,
		Args:    minArgs(1, "WORKLOAD"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			return a.each(ctx, args, func(ref string) (proto.Message, error) {
				return nil, killWorkload(ctx, c, ref, signal)
			})
		}),
	}
	cmd.Flags().StringVarP(&signal, "signal", "s", "KILL", "name or number")
	return cmd
}
