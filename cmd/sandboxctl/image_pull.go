package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

// lineEvery is how often at most a pull that is not watched on a terminal prints a line for one layer.
const lineEvery = 5 * time.Second

func (a *app) imagePullCommand() *cobra.Command {
	var insecure bool
	cmd := &cobra.Command{
		Use:   "pull [flags] IMAGE",
		Short: "Fetch an image from a registry; print its digest",
		Long:  `Pull fetches an image by tag or digest. Progress goes to standard error: bars on a terminal, lines otherwise.`,
		Example: `  sandboxctl image pull debian:12
  sandboxctl image pull ghcr.io/owner/name@sha256:…
  sandboxctl image pull --insecure registry.lan:5000/name`,
		Args: exactArgs(1, "IMAGE"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			progress := a.newProgress()
			image, err := c.PullImage(ctx, &sandboxdv1.PullImageRequest{Reference: args[0], Insecure: insecure}, progress.report)
			progress.end()
			if err != nil {
				return err
			}
			return a.printImage(image)
		}),
	}
	cmd.Flags().BoolVar(&insecure, "insecure", false, "allow plain HTTP to a registry that is not on this host")
	return cmd
}

// progress shows how a pull fares. Its methods are called by one goroutine.
type progress interface {
	report(*sandboxdv1.PullProgress)
	end()
}

func (a *app) newProgress() progress {
	if isTerminal(a.stderr) {
		return newBars(a.stderr)
	}
	return &lines{w: a.stderr, last: make(map[string]time.Time), now: time.Now}
}

// step names what a report is about: a layer being fetched, or the phase.
func step(p *sandboxdv1.PullProgress) string {
	if p.GetLayer() == "" {
		return clean(p.GetPhase())
	}
	return clean(p.GetPhase() + " " + short(p.GetLayer()))
}

// bars are for terminals: one for each step.
type bars struct {
	container *mpb.Progress
	bars      map[string]*mpb.Bar
}

func newBars(w io.Writer) *bars {
	return &bars{container: mpb.New(mpb.WithOutput(w), mpb.WithWidth(80)), bars: make(map[string]*mpb.Bar)}
}

func (b *bars) report(p *sandboxdv1.PullProgress) {
	if p.GetTotalBytes() == 0 && p.GetDoneBytes() == 0 {
		return // nothing to draw: it will soon be over
	}
	name := step(p)
	bar := b.bars[name]
	if bar == nil {
		bar = b.container.AddBar(int64(p.GetTotalBytes()),
			mpb.PrependDecorators(decor.Name(name, decor.WCSyncSpaceR)),
			mpb.AppendDecorators(decor.CountersKibiByte("% .1f / % .1f")),
		)
		b.bars[name] = bar
	}
	if p.GetTotalBytes() > 0 {
		bar.SetTotal(int64(p.GetTotalBytes()), false)
	}
	bar.SetCurrent(int64(p.GetDoneBytes()))
}

// end lets go of bars that have not come to their end, of a pull that failed, so that the container does not wait for them.
func (b *bars) end() {
	for _, bar := range b.bars {
		if !bar.Completed() {
			bar.Abort(false)
		}
	}
	b.container.Wait()
}

// lines are for logs: one when a step begins, one when it is done, and some between.
type lines struct {
	w    io.Writer
	last map[string]time.Time
	now  func() time.Time
}

func (l *lines) report(p *sandboxdv1.PullProgress) {
	name := step(p)
	last, known := l.last[name]
	done := p.GetTotalBytes() > 0 && p.GetDoneBytes() >= p.GetTotalBytes()
	if known && !done && l.now().Sub(last) < lineEvery {
		return
	}
	l.last[name] = l.now()
	switch {
	case p.GetTotalBytes() > 0:
		fmt.Fprintf(l.w, "%s: %s of %s\n", name, size(p.GetDoneBytes()), size(p.GetTotalBytes()))
	case p.GetDoneBytes() > 0:
		fmt.Fprintf(l.w, "%s: %s\n", name, size(p.GetDoneBytes()))
	default:
		fmt.Fprintf(l.w, "%s\n", name)
	}
}

func (l *lines) end() {}
