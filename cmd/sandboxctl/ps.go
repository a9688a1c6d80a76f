package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

// active are the states in which a workload has a sandbox.
var active = []sandboxdv1.WorkloadState{
	sandboxdv1.WorkloadState_WORKLOAD_STATE_STARTING,
	sandboxdv1.WorkloadState_WORKLOAD_STATE_RUNNING,
	sandboxdv1.WorkloadState_WORKLOAD_STATE_PAUSED,
	sandboxdv1.WorkloadState_WORKLOAD_STATE_STOPPING,
}

func (a *app) psCommand() *cobra.Command {
	var all, quiet bool
	var filters []string
	cmd := &cobra.Command{
		Use:   "ps [flags]",
		Short: "List workloads",
		Long: `Ps lists the workloads that run, oldest first; with -a or a filter on their state, the others too. With --format json it
prints one array of workloads.`,
		Example: `  sandboxctl ps
  sandboxctl ps -a --filter label=team=shop --filter isolation=vm
  sandboxctl ps -a --filter state=exited --filter state=failed -q
  sandboxctl ps -a --format json | jq -r '.[] | .name + " " + .status.decision.rule'`,
		Args: noArgs,
		RunE: a.call(func(ctx context.Context, c *client.Client, _ []string) error {
			f, err := parseFilters(filters)
			if err != nil {
				return err
			}
			if !all && len(f.request.States) == 0 {
				f.request.States = active
			}
			list, err := f.list(ctx, c)
			if err != nil {
				return err
			}
			return a.printWorkloads(list, quiet)
		}),
	}
	boolFlag(cmd.Flags(), &all, "all", "a", "also those that do not run")
	boolFlag(cmd.Flags(), &quiet, "quiet", "q", "only ids")
	cmd.Flags().StringArrayVar(&filters, "filter", nil, "label=KEY[=VALUE], state=STATE, isolation=container|vm or name=PART; may be repeated")
	return cmd
}

// filter selects workloads: as the daemon can, and by parts of names. Labels must all match, states and names any.
type filter struct {
	request *sandboxdv1.ListWorkloadsRequest
	names   []string
}

func parseFilters(list []string) (*filter, error) {
	f := &filter{request: &sandboxdv1.ListWorkloadsRequest{Labels: make(map[string]string)}}
	for _, entry := range list {
		kind, value, ok := strings.Cut(entry, "=")
		if !ok || value == "" {
			return nil, fmt.Errorf("cannot use --filter %q: write label=KEY[=VALUE], state=STATE, isolation=container|vm or name=PART", entry)
		}
		switch kind {
		case "label":
			key, v, _ := strings.Cut(value, "=")
			f.request.Labels[key] = v
		case "state", "status":
			state, ok := sandboxdv1.WorkloadState_value["WORKLOAD_STATE_"+strings.ToUpper(value)]
			if !ok || state == 0 {
				return nil, fmt.Errorf("cannot use --filter %q: the states are created, starting, running, paused, stopping, exited, failed and deleting", entry)
			}
			f.request.States = append(f.request.States, sandboxdv1.WorkloadState(state))
		case "isolation":
			i, err := parseIsolation(value)
			if err != nil || i == sandboxdv1.Isolation_ISOLATION_AUTO {
				return nil, fmt.Errorf("cannot use --filter %q: workloads run as container or vm", entry)
			}
			f.request.Isolation = i
		case "name":
			f.names = append(f.names, value)
		default:
			return nil, fmt.Errorf("cannot use --filter %q: there are label, state, isolation and name", entry)
		}
	}
	return f, nil
}

func (f *filter) list(ctx context.Context, c *client.Client) ([]*sandboxdv1.Workload, error) {
	all, err := c.ListWorkloads(ctx, f.request)
	if err != nil {
		return nil, err
	}
	list := all[:0]
	for _, w := range all {
		if f.named(w.GetName()) {
			list = append(list, w)
		}
	}
	return list, nil
}

func (f *filter) named(name string) bool {
	for _, part := range f.names {
		if strings.Contains(name, part) {
			return true
		}
	}
	return len(f.names) == 0
}

func (a *app) printWorkloads(list []*sandboxdv1.Workload, quiet bool) error {
	if quiet {
		for _, w := range list {
			if _, err := fmt.Fprintln(a.stdout, w.GetId()); err != nil {
				return err
			}
		}
		return nil
	}
	if a.json() {
		return printJSONArray(a, list)
	}
	now := time.Now()
	var rows [][]string
	for _, w := range list {
		rows = append(rows, []string{
			short(w.GetId()), w.GetName(), w.GetSpec().GetImage(), wall(w.GetStatus()), statusText(w, now),
			age(now.Sub(w.GetCreatedAt().AsTime())) + " ago", w.GetStatus().GetDecision().GetRule(),
		})
	}
	return table(a.stdout, []string{"ID", "NAME", "IMAGE", "ISOLATION", "STATUS", "CREATED", "RULE"}, rows)
}

// wall is the isolation, and of a vm the accelerator when it is known.
func wall(s *sandboxdv1.WorkloadStatus) string {
	if s.GetAccelerator() != "" {
		return isolationText(s.GetIsolation()) + " (" + s.GetAccelerator() + ")"
	}
	return isolationText(s.GetIsolation())
}

func statusText(w *sandboxdv1.Workload, now time.Time) string {
	s := w.GetStatus()
	switch s.GetState() {
	case sandboxdv1.WorkloadState_WORKLOAD_STATE_RUNNING:
		return "Up " + age(now.Sub(s.GetStartedAt().AsTime()))
	case sandboxdv1.WorkloadState_WORKLOAD_STATE_PAUSED:
		return "Up " + age(now.Sub(s.GetStartedAt().AsTime())) + " (paused)"
	case sandboxdv1.WorkloadState_WORKLOAD_STATE_EXITED:
		text := fmt.Sprintf("Exited (%d) %s ago", s.GetExitCode(), age(now.Sub(s.GetExitedAt().AsTime())))
		if s.GetOomKilled() {
			text += ", out of memory"
		}
		return text
	}
	text := stateText(s.GetState())
	return strings.ToUpper(text[:1]) + text[1:]
}
