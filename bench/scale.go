package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

const (
	// manyAtOnce are held at once where starts must not slow down.
	manyAtOnce = 500
	// aside are how many starts at either end of those are compared: single ones scatter.
	aside = 40
	// weighed is how many containers stand when they are weighed.
	weighed = 100
	// createsAtOnce all have to succeed.
	createsAtOnce = 200
	// livesPerRate is how many whole lives each rate is measured over.
	livesPerRate = 96
	// manyExecs must leave daemon and agent as large as they were; they are weighed after the first tenth.
	manyExecs = 10_000
	// outputBytes is what the output rows carry.
	outputBytes = 1 << 30
)

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// benchMany holds 500 containers at once: how long the first and the last of them took to start, and, at 100, what they weigh.
func benchMany(ctx context.Context, b *bench) (rows []row, err error) {
	d := b.d
	var ids []string
	defer func() { err = errors.Join(err, d.deleteAll(context.WithoutCancel(ctx), ids)) }()
	before, err := rss(d.cmd.Process.Pid)
	if err != nil {
		return nil, err
	}
	var times []float64
	for n := range manyAtOnce {
		begin := time.Now()
		id, err := d.start(ctx, container, "sleep")
		if id != "" {
			ids = append(ids, id)
		}
		if err != nil {
			return nil, fmt.Errorf("container %d: %w", n+1, err)
		}
		times = append(times, ms(time.Since(begin)))
		if n+1 != weighed {
			continue
		}
		values, err := d.pss(ctx, ids)
		if err != nil {
			return nil, err
		}
		after, err := rss(d.cmd.Process.Pid)
		if err != nil {
			return nil, err
		}
		group := fmt.Sprintf("memory, %d containers at once", weighed)
		rows = append(rows, newRow(group, "each", "MiB", "PSS on the host of the agent", values),
			newRow(group, "daemon RSS growth, each", "KiB", fmt.Sprintf("from %.1f to %.1f MiB", before, after), []float64{(after - before) * 1024 / weighed}))
	}
	group := fmt.Sprintf("%d containers at once: create and start", manyAtOnce)
	first := newRow(group, fmt.Sprintf("first %d", aside), "ms", "gRPC create and start, one after another", times[:aside])
	last := newRow(group, fmt.Sprintf("last %d", aside), "ms", "the same, with the others running; ratio: last to first", times[len(times)-aside:])
	last.Ratio = last.Median / first.Median
	return append(rows, first, last), nil
}

func (d *daemon) deleteAll(ctx context.Context, ids []string) error {
	var g errgroup.Group
	g.SetLimit(8)
	for _, id := range ids {
		g.Go(func() error { return d.delete(ctx, id) })
	}
	return g.Wait()
}

// benchRates lives whole lives side by side.
func benchRates(ctx context.Context, b *bench) ([]row, error) {
	d := b.d
	var rows []row
	for _, callers := range []int{1, 2, 8, 32} {
		begin := time.Now()
		g, gctx := errgroup.WithContext(ctx)
		g.SetLimit(callers)
		for range livesPerRate {
			g.Go(func() error {
				code, err := d.run(gctx, container, "true")
				if err == nil && code != 0 {
					err = fmt.Errorf("exited with %d", code)
				}
				return err
			})
		}
		if err := g.Wait(); err != nil {
			return nil, err
		}
		rows = append(rows, newRow("containers per second, whole lives", fmt.Sprintf("%d callers", callers), "/s",
			fmt.Sprintf("RunWorkload to its removal; %d lives", livesPerRate), []float64{livesPerRate / time.Since(begin).Seconds()}))
	}
	begin := time.Now()
	ids := make([]string, createsAtOnce)
	var g errgroup.Group
	for i := range ids {
		g.Go(func() (err error) {
			ids[i], err = d.start(ctx, container, "sleep")
			return err
		})
	}
	err := g.Wait()
	took := time.Since(begin)
	if err := errors.Join(err, d.deleteAll(ctx, ids)); err != nil {
		return nil, err
	}
	return append(rows, newRow(fmt.Sprintf("%d creates and starts at once", createsAtOnce), "until the last runs", "ms", "all succeeded", []float64{ms(took)})), nil
}

// benchOutput carries bytes through an exec: the same command of the same image, by each one's own client, counted behind cat
// and, for ours, also where cat would stand. They take turns.
func benchOutput(ctx context.Context, b *bench) ([]row, error) {
	d, p := b.d, b.p
	const group = "output through an exec"
	script := []string{"/bin/dd", "if=/dev/zero", "bs=1M", fmt.Sprintf("count=%d", outputBytes>>20), "status=none"}
	ours, err := d.start(ctx, container, "sleep")
	if err != nil {
		return nil, err
	}
	defer func() { _ = d.delete(context.WithoutCancel(ctx), ours) }()
	if err := hideUnifiedCgroup(); err != nil {
		return nil, err
	}
	end, err := p.sleeper(ctx, "crun")
	if err != nil {
		return nil, err
	}
	defer end()
	ctl := slices.Concat(d.ctl, []string{"exec", ours}, script)
	crun := slices.Concat([]string{"crun", "--root", p.root("crun"), "exec", "sleeper-crun"}, script)
	subjects := []struct {
		name    string
		command [][]string
	}{
		{"sandboxctl exec | cat", [][]string{ctl, {"cat"}}},
		{"crun exec | cat", [][]string{crun, {"cat"}}},
		{"sandboxctl exec", [][]string{ctl}},
	}
	rates := make([][]float64, len(subjects))
	const rounds = 11
	for range rounds {
		for i, s := range subjects {
			begin := time.Now()
			n, err := carry(ctx, s.command)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", s.name, err)
			}
			if n != outputBytes {
				return nil, fmt.Errorf("%s: %d bytes came out, not %d", s.name, n, outputBytes)
			}
			rates[i] = append(rates[i], float64(n)/1e6/time.Since(begin).Seconds())
		}
	}
	var rows []row
	for i, s := range subjects {
		rows = append(rows, newRow(group, s.name, "MB/s", fmt.Sprintf("%d MiB each, processes' starts and ends included", outputBytes>>20), rates[i]))
	}
	const our, their, straight = 0, 1, 2
	rows[their].Ratio = rows[our].Median / rows[their].Median
	rows[straight].Ratio = rows[straight].Median / rows[their].Median
	rows[straight].Includes += "; the ratio is to crun exec | cat"
	return rows, nil
}

// carry runs a pipeline and counts what comes out of it. All of its commands must succeed.
func carry(ctx context.Context, pipeline [][]string) (int64, error) {
	var in io.Reader
	var out io.ReadCloser
	var commands []*exec.Cmd
	for _, argv := range pipeline {
		c := exec.CommandContext(ctx, argv[0], argv[1:]...)
		c.Stdin = in
		var err error
		if out, err = c.StdoutPipe(); err != nil {
			return 0, err
		}
		if err := c.Start(); err != nil {
			return 0, err
		}
		commands = append(commands, c)
		in = out
	}
	total := int64(0)
	buf := make([]byte, 256<<10)
	for {
		n, err := out.Read(buf)
		total += int64(n)
		if err != nil {
			break
		}
	}
	var errs []error
	for _, c := range slices.Backward(commands) {
		errs = append(errs, c.Wait())
	}
	return total, errors.Join(errs...)
}

// benchManyExecs weighs daemon and agent before and after thousands of execs.
func benchManyExecs(ctx context.Context, b *bench) ([]row, error) {
	d := b.d
	id, err := d.start(ctx, container, "sleep")
	if err != nil {
		return nil, err
	}
	defer func() { _ = d.delete(context.WithoutCancel(ctx), id) }()
	w, err := d.workloads.GetWorkload(ctx, &sandboxdv1.GetWorkloadRequest{Id: id})
	if err != nil {
		return nil, err
	}
	pids := []int{d.cmd.Process.Pid, int(w.GetWorkload().GetStatus().GetHostPid())}
	weigh := func() (out [2]float64, err error) {
		for i, pid := range pids {
			if out[i], err = rss(pid); err != nil {
				return out, err
			}
		}
		return out, nil
	}
	var before [2]float64
	for n := range manyExecs {
		if n == manyExecs/10 {
			if before, err = weigh(); err != nil {
				return nil, err
			}
		}
		if code, err := d.exec(ctx, id, "true"); err != nil || code != 0 {
			return nil, fmt.Errorf("exec %d: exit code %d, %w", n, code, err)
		}
	}
	after, err := weigh()
	if err != nil {
		return nil, err
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pids[0]))
	if err != nil {
		return nil, err
	}
	group := fmt.Sprintf("%d execs: growth after the first tenth", manyExecs)
	var rows []row
	for i, name := range []string{"daemon RSS", "agent RSS"} {
		rows = append(rows, newRow(group, name, "MiB", strings.TrimSpace(fmt.Sprintf("from %.1f to %.1f; the daemon has %d descriptors", before[i], after[i], len(fds))), []float64{after[i] - before[i]}))
	}
	return rows, nil
}
