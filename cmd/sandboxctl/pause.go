package main

import (
	"context"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) pauseCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "pause WORKLOAD...",
		Short: "Make workloads stand still",
		Long: `Pause makes every process of a workload, or its whole VM, stand still until resume; what it has it keeps. It uses no
processor time then, and answers no exec or cp. stop, kill and rm -f work on it. A restart of sandboxd changes nothing.`,
		Example: `  sandboxctl pause web && sandboxctl resume web`,
		Args:    minArgs(1, "WORKLOAD"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			return a.each(ctx, args, func(ref string) (proto.Message, error) {
				r, err := c.Workloads.PauseWorkload(ctx, &sandboxdv1.PauseWorkloadRequest{Id: ref})
				return r.GetWorkload(), err
			})
		}),
	}
}

func (a *app) resumeCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "resume WORKLOAD...",
		Aliases: []string{"unpause"},
		Short:   "Let paused workloads go on",
		Example: `  sandboxctl resume web`,
		Args:    minArgs(1, "WORKLOAD"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			return a.each(ctx, args, func(ref string) (proto.Message, error) {
				r, err := c.Workloads.ResumeWorkload(ctx, &sandboxdv1.ResumeWorkloadRequest{Id: ref})
				return r.GetWorkload(), err
			})
		}),
	}
}
