package main

import (
	"context"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) waitCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "wait WORKLOAD...",
		Short:   "Wait until workloads have ended; print their exit codes",
		Example: `  code=$(sandboxctl wait job)`,
		Args:    minArgs(1, "WORKLOAD"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			var errs []error
			for _, ref := range args {
				errs = append(errs, a.wait(ctx, c, ref))
			}
			return errors.Join(errs...)
		}),
	}
}

func (a *app) wait(ctx context.Context, c *client.Client, ref string) error {
	r, err := c.Workloads.WaitWorkload(ctx, &sandboxdv1.WaitWorkloadRequest{Id: ref})
	if err != nil {
		return err
	}
	w := r.GetWorkload()
	if a.json() {
		return a.printJSON(w)
	}
	if w.GetStatus().ExitCode == nil {
		return fmt.Errorf("workload %s has no exit code: it is %s: %s", ref, stateText(w.GetStatus().GetState()), w.GetStatus().GetMessage())
	}
	_, err = fmt.Fprintln(a.stdout, w.GetStatus().GetExitCode())
	return err
}
