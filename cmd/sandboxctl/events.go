package main

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) eventsCommand() *cobra.Command {
	var since string
	cmd := &cobra.Command{
		Use:   "events [flags] [WORKLOAD]",
		Short: "Show what happens, as it happens",
		Long:  `Events prints a line for each event until it is interrupted; with --format json each line is one event.`,
		Example: `  sandboxctl events
  sandboxctl events --since 1h web
  sandboxctl events --format json | jq -r 'select(.type == "TYPE_EXITED") | .workloadName'`,
		Args: func(cmd *cobra.Command, args []string) error {
			return exactArgs(min(len(args), 1), "")(cmd, args)
		},
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			request := &sandboxdv1.WatchEventsRequest{}
			if len(args) > 0 {
				request.Id = args[0]
			}
			var err error
			if request.Since, err = parseTime("since", since, time.Now()); err != nil {
				return err
			}
			return c.Watch(ctx, request, a.printEvent)
		}),
	}
	cmd.Flags().StringVar(&since, "since", "", "also past ones from a time on: 2006-01-02T15:04:05Z, or 10m for ten minutes ago")
	return cmd
}

func (a *app) printEvent(e *sandboxdv1.Event) error {
	if a.json() {
		return a.printJSONLine(e)
	}
	fields := []string{
		e.GetTime().AsTime().Local().Format(time.RFC3339),
		strings.ToLower(strings.ReplaceAll(strings.TrimPrefix(e.GetType().String(), "TYPE_"), "_", "-")),
	}
	if e.GetWorkloadId() != "" {
		fields = append(fields, short(e.GetWorkloadId()), clean(e.GetWorkloadName()), isolationText(e.GetIsolation()))
	}
	if e.GetMessage() != "" {
		fields = append(fields, clean(e.GetMessage()))
	}
	var attributes []string
	for _, key := range slices.Sorted(maps.Keys(e.GetAttributes())) {
		attributes = append(attributes, clean(key+"="+e.GetAttributes()[key]))
	}
	if len(attributes) > 0 {
		fields = append(fields, "("+strings.Join(attributes, ", ")+")")
	}
	_, err := fmt.Fprintln(a.stdout, strings.Join(fields, " "))
	return err
}
