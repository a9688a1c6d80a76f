package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/fieldmaskpb"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) updateCommand() *cobra.Command {
	var flags resourceFlags
	cmd := &cobra.Command{
		Use:   "update [flags] WORKLOAD...",
		Short: "Change limits of workloads, while they run too",
		Long: `Update changes the limits that are named and leaves the others: of a workload that runs or is paused at once, of another for
its next start. 0, or "" for a list, goes back to the default. The policy is asked again, and may refuse. A VM keeps the
memory, the number of processors and of processes it booted with; what its QEMU may use of the host can be changed.`,
		Example: `  sandboxctl update --cpus 0.5 --memory 512m web
  sandboxctl update --cpuset-cpus "" --io-read-bps 0 web`,
		Args: minArgs(1, "WORKLOAD"),
	}
	flags.register(cmd.Flags())
	cmd.RunE = a.call(func(ctx context.Context, c *client.Client, args []string) error {
		fields := flags.fields()
		if len(fields) == 0 {
			return usageError(cmd, fmt.Errorf("nothing to change: name at least one limit"))
		}
		return a.each(ctx, args, func(ref string) (proto.Message, error) {
			resources, err := flags.updateOf(ctx, c, ref)
			if err != nil {
				return nil, err
			}
			r, err := c.Workloads.UpdateWorkload(ctx, &sandboxdv1.UpdateWorkloadRequest{
				Id: ref, Resources: resources, UpdateMask: &fieldmaskpb.FieldMask{Paths: fields},
			})
			return r.GetWorkload(), err
		})
	})
	return cmd
}

// updateOf are the limits for one workload, whose memory --memory-swap may need.
func (c *resourceFlags) updateOf(ctx context.Context, cl *client.Client, ref string) (*sandboxdv1.Resources, error) {
	if c.cpus == "0" {
		c.cpus = "" // named all the same: back to the default
	}
	if c.memorySwap == "" || c.memory != "" {
		return c.resources(0)
	}
	r, err := cl.Workloads.GetWorkload(ctx, &sandboxdv1.GetWorkloadRequest{Id: ref})
	if err != nil {
		return nil, err
	}
	return c.resources(r.GetWorkload().GetSpec().GetResources().GetMemoryBytes())
}
