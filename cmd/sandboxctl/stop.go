package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) stopCommand() *cobra.Command {
	var grace time.Duration
	cmd := &cobra.Command{
		Use:     "stop [flags] WORKLOAD...",
		Short:   "Ask workloads to end, then make them",
		Example: `  sandboxctl stop --grace 30s web`,
		Args:    minArgs(1, "WORKLOAD"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			return a.each(ctx, args, func(ref string) (proto.Message, error) {
				r, err := c.Workloads.StopWorkload(ctx, &sandboxdv1.StopWorkloadRequest{Id: ref, Grace: durationpb.New(grace)})
				return r.GetWorkload(), err
			})
		}),
	}
	cmd.Flags().DurationVar(&grace, "grace", 10*time.Second, "time between the stop signal and SIGKILL")
	return cmd
}
