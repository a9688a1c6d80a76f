package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) inspectCommand() *cobra.Command {
	var oci bool
	cmd := &cobra.Command{
		Use:   "inspect [flags] WORKLOAD...",
		Short: "Show everything about workloads, as JSON",
		Long:  `Inspect prints one JSON object for each workload named, one after the other.`,
		Example: `  sandboxctl inspect web
  sandboxctl inspect web | jq -r .status.decision.reason
  sandboxctl inspect --oci web | jq .process.capabilities`,
		Args: minArgs(1, "WORKLOAD"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			var errs []error
			for _, ref := range args {
				errs = append(errs, a.inspect(ctx, c, ref, oci))
			}
			return errors.Join(errs...)
		}),
	}
	cmd.Flags().BoolVar(&oci, "oci", false, "the effective OCI runtime-spec configuration instead")
	return cmd
}

func (a *app) inspect(ctx context.Context, c *client.Client, ref string, oci bool) error {
	if oci {
		r, err := c.Workloads.GetOCIConfig(ctx, &sandboxdv1.GetOCIConfigRequest{Id: ref})
		if err != nil {
			return err
		}
		return a.printRawJSON(r.GetConfig())
	}
	r, err := c.Workloads.GetWorkload(ctx, &sandboxdv1.GetWorkloadRequest{Id: ref})
	if err != nil {
		return err
	}
	return a.printJSON(r.GetWorkload())
}
