package main

import (
	"context"
	"fmt"
	"os"

	"golang.org/x/sync/errgroup"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

const (
	// manyKnown workloads are created, and never started, to make a daemon's heap large.
	manyKnown = 5000
	// Labels of each of them: their number, and the bytes of each one's value.
	labelsEach, labelBytes = 32, 256
	// createsSideBySide is how many callers create them.
	createsSideBySide = 8
)

// benchHeap compares whole lives of a daemon that knows many workloads with those of one that knows none: they take turns.
func benchHeap(ctx context.Context, b *bench) ([]row, error) {
	o := b.options
	o.large = true
	d, err := startDaemon(ctx, o, b.dir)
	if err != nil {
		return nil, err
	}
	defer d.stop()
	before, err := rss(d.cmd.Process.Pid)
	if err != nil {
		return nil, err
	}
	fmt.Fprintf(os.Stderr, "heap: creating %d workloads\n", manyKnown)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(createsSideBySide)
	for i := range manyKnown {
		g.Go(func() error {
			labels := map[string]string{}
			for l := range labelsEach {
				labels[fmt.Sprintf("label-%d", l)] = fmt.Sprintf("%0*d", labelBytes, i)
			}
			_, err := d.workloads.CreateWorkload(gctx, &sandboxdv1.CreateWorkloadRequest{Labels: labels, Spec: request(container, "true")})
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	after, err := rss(d.cmd.Process.Pid)
	if err != nil {
		return nil, err
	}
	life := func(d *daemon) func(context.Context, string) (int, error) {
		return func(ctx context.Context, command string) (int, error) { return d.run(ctx, container, command) }
	}
	return measure(ctx, "create → exit, container, by what the daemon holds", b.runs, []subject{
		{name: fmt.Sprintf("%d workloads", manyKnown), do: life(d),
			includes: fmt.Sprintf("RunWorkload; each with %d labels; the daemon grew from %.0f to %.0f MiB", labelsEach, before, after)},
		{name: "none", do: life(b.d), includes: "the same; ratio: with many to with none"},
	})
}
