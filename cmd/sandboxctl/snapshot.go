package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"
	"google.golang.org/protobuf/proto"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

func (a *app) snapshotCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "snapshot",
		Short: "Take, list and remove snapshots of running VM workloads",
		Long: `A snapshot is a running workload as it was at one moment: memory, processes, open files and disk. restore makes workloads
that go on from it. Only a VM that was created with --snapshots has them.`,
		Args: cobra.ArbitraryArgs,
		RunE: subcommands,
	}
	cmd.AddCommand(a.snapshotCreateCommand(), a.snapshotLsCommand(), a.snapshotRmCommand())
	return cmd
}

func (a *app) snapshotCreateCommand() *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use:   "create [flags] WORKLOAD",
		Short: "Take a snapshot of a running workload, which goes on; print its id",
		Example: `  sandboxctl run -d --isolation vm --snapshots --name web debian ./server
  sandboxctl restore $(sandboxctl snapshot create web)`,
		Args: exactArgs(1, "WORKLOAD"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			r, err := c.Snapshots.CreateSnapshot(ctx, &sandboxdv1.CreateSnapshotRequest{Id: args[0], Name: name})
			if err != nil {
				return err
			}
			if a.json() {
				return a.printJSON(r.GetSnapshot())
			}
			_, err = fmt.Fprintln(a.stdout, r.GetSnapshot().GetId())
			return err
		}),
	}
	cmd.Flags().StringVar(&name, "name", "", "name of the snapshot; its id's first digits when left out")
	return cmd
}

func (a *app) snapshotLsCommand() *cobra.Command {
	var quiet bool
	cmd := &cobra.Command{
		Use:     "ls",
		Short:   "List snapshots, the oldest first",
		Example: `  sandboxctl snapshot ls`,
		Args:    noArgs,
		RunE: a.call(func(ctx context.Context, c *client.Client, _ []string) error {
			r, err := c.Snapshots.ListSnapshots(ctx, &sandboxdv1.ListSnapshotsRequest{})
			if err != nil {
				return err
			}
			return a.printSnapshots(r.GetSnapshots(), quiet)
		}),
	}
	boolFlag(cmd.Flags(), &quiet, "quiet", "q", "only ids")
	return cmd
}

func (a *app) printSnapshots(snapshots []*sandboxdv1.Snapshot, quiet bool) error {
	if quiet {
		for _, s := range snapshots {
			if _, err := fmt.Fprintln(a.stdout, s.GetId()); err != nil {
				return err
			}
		}
		return nil
	}
	if a.json() {
		return printJSONArray(a, snapshots)
	}
	now := time.Now()
	var rows [][]string
	for _, s := range snapshots {
		rows = append(rows, []string{
			short(s.GetId()), s.GetName(), s.GetWorkloadName(), size(s.GetMemoryBytes()), size(s.GetDiskBytes()),
			s.GetPause().AsDuration().Round(time.Millisecond).String(), age(now.Sub(s.GetCreatedAt().AsTime())) + " ago",
		})
	}
	return table(a.stdout, []string{"ID", "NAME", "WORKLOAD", "MEMORY", "DISK", "PAUSE", "TAKEN"}, rows)
}

func (a *app) snapshotRmCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "rm SNAPSHOT...",
		Short:   "Remove snapshots; what went on from them runs on",
		Example: `  sandboxctl snapshot rm $(sandboxctl snapshot ls -q)`,
		Args:    minArgs(1, "SNAPSHOT"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			return a.each(ctx, args, func(ref string) (proto.Message, error) {
				_, err := c.Snapshots.DeleteSnapshot(ctx, &sandboxdv1.DeleteSnapshotRequest{Snapshot: ref})
				return nil, err
			})
		}),
	}
}

// ownFlags are what a workload that goes on from another has of its own.
type ownFlags struct {
	name, hostname, key string
	labels              []string
}

func (o *ownFlags) register(f *pflag.FlagSet) {
	f.StringVar(&o.name, "name", "", "unique name; the id's first digits when left out")
	f.StringVar(&o.hostname, "hostname", "", "host name; the id's first digits when left out")
	f.StringArrayVarP(&o.labels, "label", "l", nil, "key=value beside the labels it had; may be repeated")
	f.StringVar(&o.key, "idempotency-key", "", "a retry with the same key makes no second workload")
}

func (a *app) restoreCommand() *cobra.Command {
	var own ownFlags
	cmd := &cobra.Command{
		Use:     "restore [flags] SNAPSHOT",
		Short:   "Make a workload that goes on from a snapshot; print its id",
		Example: `  sandboxctl restore --name again 3f9c`,
		Args:    exactArgs(1, "SNAPSHOT"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			labels, err := parseLabels(own.labels)
			if err != nil {
				return err
			}
			r, err := c.Snapshots.RestoreSnapshot(ctx, &sandboxdv1.RestoreSnapshotRequest{
				Snapshot: args[0], Name: own.name, Hostname: own.hostname, Labels: labels, IdempotencyKey: own.key,
			})
			if err != nil {
				return err
			}
			return a.printMade(r.GetWorkload())
		}),
	}
	own.register(cmd.Flags())
	return cmd
}

func (a *app) forkCommand() *cobra.Command {
	var own ownFlags
	cmd := &cobra.Command{
		Use:     "fork [flags] WORKLOAD",
		Short:   "Make a workload that goes on where a running VM is, which goes on too; print its id",
		Example: `  sandboxctl fork --name try web`,
		Args:    exactArgs(1, "WORKLOAD"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			labels, err := parseLabels(own.labels)
			if err != nil {
				return err
			}
			r, err := c.Snapshots.ForkWorkload(ctx, &sandboxdv1.ForkWorkloadRequest{
				Id: args[0], Name: own.name, Hostname: own.hostname, Labels: labels, IdempotencyKey: own.key,
			})
			if err != nil {
				return err
			}
			return a.printMade(r.GetWorkload())
		}),
	}
	own.register(cmd.Flags())
	return cmd
}

func (a *app) printMade(w *sandboxdv1.Workload) error {
	if a.json() {
		return a.printJSON(w)
	}
	_, err := fmt.Fprintln(a.stdout, w.GetId())
	return err
}
