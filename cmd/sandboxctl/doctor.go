package main

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) doctorCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "doctor",
		Short:   "Check the daemon and its host, and say what to do",
		Long:    `Doctor runs every check and shows what was found. The exit code is 0 when none failed, 1 when one did.`,
		Example: `  sandboxctl doctor`,
		Args:    noArgs,
		RunE: a.call(func(ctx context.Context, c *client.Client, _ []string) error {
			answer, err := c.System.Doctor(ctx, &sandboxdv1.DoctorRequest{})
			if err != nil {
				return err
			}
			if a.json() {
				err = a.printJSON(answer)
			} else {
				err = a.printChecks(answer.GetChecks())
			}
			if err != nil {
				return err
			}
			for _, check := range answer.GetChecks() {
				if check.GetResult() == sandboxdv1.Check_RESULT_FAILED {
					return exitStatus(exitNo)
				}
			}
			return nil
		}),
	}
}

func (a *app) printChecks(checks []*sandboxdv1.Check) error {
	counts := make(map[sandboxdv1.Check_Result]int)
	for _, check := range checks {
		counts[check.GetResult()]++
		result := strings.ToLower(strings.TrimPrefix(check.GetResult().String(), "RESULT_"))
		if _, err := fmt.Fprintf(a.stdout, "%-8s %s: %s\n", result, clean(check.GetName()), clean(check.GetFinding())); err != nil {
			return err
		}
		if check.GetAdvice() != "" {
			fmt.Fprintf(a.stdout, "%-8s → %s\n", "", clean(check.GetAdvice()))
		}
	}
	_, err := fmt.Fprintf(a.stdout, "\n%s, %s, %d failed\n", plural(len(checks), "check"),
		plural(counts[sandboxdv1.Check_RESULT_WARNING], "warning"), counts[sandboxdv1.Check_RESULT_FAILED])
	return err
}
