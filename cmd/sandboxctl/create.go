package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) createCommand() *cobra.Command {
	var flags createFlags
	cmd := &cobra.Command{
		Use:   "create [flags] IMAGE [COMMAND [ARG...]]",
		Short: "Record a workload and the policy's decision; print its id",
		Example: `  id=$(sandboxctl create --memory 256m -e MODE=test debian sh -c 'echo $MODE')
  sandboxctl start "$id" && sandboxctl wait "$id" && sandboxctl logs "$id"`,
		Args: minArgs(1, "IMAGE"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			request, err := flags.request(args[0], args[1:])
			if err != nil {
				return err
			}
			created, err := c.Workloads.CreateWorkload(ctx, request)
			if err != nil {
				return err
			}
			if a.json() {
				return a.printJSON(created.GetWorkload())
			}
			_, err = fmt.Fprintln(a.stdout, created.GetWorkload().GetId())
			return err
		}),
	}
	flags.register(cmd.Flags())
	flags.registerKey(cmd.Flags())
	cmd.Flags().SetInterspersed(false)
	return cmd
}
