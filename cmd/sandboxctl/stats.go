package main

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

const (
	// statsEvery is the time between two looks of the live table, long enough for a steady CPU share.
	statsEvery = 2 * time.Second
	// statsOnce is the time between the two looks that a CPU share needs, with --no-stream.
	statsOnce = 500 * time.Millisecond
)

func (a *app) statsCommand() *cobra.Command {
	var noStream bool
	cmd := &cobra.Command{
		Use:   "stats [flags] [WORKLOAD...]",
		Short: "Show what workloads use",
		Long: `Stats shows what the host counts for each running workload, or for those named, until it is interrupted. MEMORY is the
working set: without file pages that were not used lately, which are in CACHE. A VM's memory is that of its whole QEMU
process. READ and WRITTEN are what reached the disk. WAITS is how much of the last ten seconds some of its tasks waited
for a resource, where the host has PSI. With --format json each line is one usage, with more in it.`,
		Example: `  sandboxctl stats
  sandboxctl stats --no-stream web
  sandboxctl stats --no-stream --format json | jq -r '.name + " " + .memoryBytes'`,
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			return a.stats(ctx, c, args, noStream)
		}),
	}
	cmd.Flags().BoolVar(&noStream, "no-stream", false, "print once and exit")
	return cmd
}

func (a *app) stats(ctx context.Context, c *client.Client, refs []string, once bool) error {
	before := make(map[string]*sandboxdv1.Usage)
	first := true
	for {
		list, err := usages(ctx, c, refs)
		if err != nil {
			return err
		}
		// A CPU share needs two looks: the first one of the table is not shown.
		pause := statsEvery
		if first {
			pause = statsOnce
		}
		switch {
		case a.json():
			for _, u := range list {
				if err := a.printJSONLine(u); err != nil {
					return err
				}
			}
			if once {
				return nil
			}
		case !first:
			if err := a.printUsages(list, before, !once && isTerminal(a.stdout)); err != nil {
				return err
			}
			if once {
				return nil
			}
		}
		first = false
		for _, u := range list {
			before[u.GetId()] = u
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(pause):
		}
	}
}

// usages asks for those named, or for all that run; of the latter one that has just ended is left out.
func usages(ctx context.Context, c *client.Client, refs []string) ([]*sandboxdv1.Usage, error) {
	if len(refs) == 0 {
		return c.ListUsage(ctx, &sandboxdv1.ListUsageRequest{})
	}
	var list []*sandboxdv1.Usage
	for _, ref := range refs {
		r, err := c.Workloads.GetUsage(ctx, &sandboxdv1.GetUsageRequest{Id: ref})
		if err != nil {
			return nil, err
		}
		list = append(list, r.GetUsage())
	}
	return list, nil
}

func (a *app) printUsages(list []*sandboxdv1.Usage, before map[string]*sandboxdv1.Usage, live bool) error {
	var rows [][]string
	for _, u := range list {
		rows = append(rows, []string{
			short(u.GetId()), u.GetName(), isolationText(u.GetIsolation()), cpuShare(before[u.GetId()], u),
			size(u.GetMemoryWorkingSetBytes()) + " / " + limit(u.GetMemoryLimitBytes()),
			size(u.GetMemoryCacheBytes()) + " / " + size(u.GetMemoryPeakBytes()),
			fmt.Sprintf("%d / %s", u.GetPids(), count(u.GetPidsLimit())),
			size(u.GetIoReadBytes()) + " / " + size(u.GetIoWriteBytes()),
			size(u.GetDiskBytes()) + " / " + limit(u.GetDiskLimitBytes()),
			pressure(u.GetCpuPressure()) + " / " + pressure(u.GetMemoryPressure()) + " / " + pressure(u.GetIoPressure()),
		})
	}
	var out bytes.Buffer
	if live {
		// Home, and clear to the end of the screen: less flicker than clearing first.
		out.WriteString("\x1b[H\x1b[J")
	}
	if err := table(&out, []string{"ID", "NAME", "ISOLATION", "CPU", "MEMORY / LIMIT", "CACHE / PEAK", "PIDS / LIMIT", "READ / WRITTEN", "DISK / LIMIT", "WAITS CPU / MEM / IO"}, rows); err != nil {
		return err
	}
	_, err := a.stdout.Write(out.Bytes())
	return err
}

// cpuShare is in percent of one processor, between two looks.
func cpuShare(before, now *sandboxdv1.Usage) string {
	wall := now.GetTime().AsTime().Sub(before.GetTime().AsTime())
	if before == nil || wall <= 0 {
		return "-"
	}
	used := now.GetCpuTime().AsDuration() - before.GetCpuTime().AsDuration()
	return fmt.Sprintf("%.1f%%", 100*max(used.Seconds(), 0)/wall.Seconds())
}

// pressure is the share of the last ten seconds in which some task waited.
func pressure(p *sandboxdv1.Pressure) string {
	if p == nil {
		return "-"
	}
	return fmt.Sprintf("%.0f%%", p.GetSomeAvg10())
}

func limit(n uint64) string {
	if n == 0 {
		return "-"
	}
	return size(n)
}

func count(n uint64) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprint(n)
}
