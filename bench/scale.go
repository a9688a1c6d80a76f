package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
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
	outputBytes = 256 << 20
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
			fmt.Sprintf("create, start, wait, delete; %d lives", livesPerRate), []float64{livesPerRate / time.Since(begin).Seconds()}))
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

// benchOutput carries bytes through an exec. crun's go through a pipe to cat, as ours go through the daemon.
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
	var rates [2][]float64
	const rounds = 5
	for range rounds {
		for i, carry := range []func() (int64, error){
			func() (int64, error) { return d.output(ctx, ours, script) },
			func() (int64, error) { return p.output(ctx, "crun", script) },
		} {
			begin := time.Now()
			n, err := carry()
			if err != nil {
				return nil, err
			}
			if n != outputBytes {
				return nil, fmt.Errorf("%d bytes came out, not %d", n, outputBytes)
			}
			rates[i] = append(rates[i], float64(n)/1e6/time.Since(begin).Seconds())
		}
	}
	our := newRow(group, "sandboxd container", "MB/s", "gRPC Exec, counted by the caller", rates[0])
	their := newRow(group, "crun exec | cat", "MB/s", "counted behind cat", rates[1])
	their.Ratio = our.Median / their.Median
	return []row{our, their}, nil
}

// output runs a command and counts what it prints.
func (d *daemon) output(ctx context.Context, id string, command []string) (int64, error) {
	s, err := d.workloads.Exec(ctx)
	if err != nil {
		return 0, err
	}
	if err := s.Send(&sandboxdv1.ExecRequest{Request: &sandboxdv1.ExecRequest_Start{Start: &sandboxdv1.ExecStart{Id: id, Command: command}}}); err != nil {
		return 0, err
	}
	total := int64(0)
	for {
		r, err := s.Recv()
		if err != nil {
			return 0, err
		}
		total += int64(len(r.GetStdout()))
		if x := r.GetExit(); x != nil {
			if x.GetCode() != 0 {
				return 0, fmt.Errorf("it exited with %d", x.GetCode())
			}
			return total, nil
		}
	}
}

func (p *peers) output(ctx context.Context, name string, command []string) (int64, error) {
	args := append([]string{"--root", p.root(name), "exec", "sleeper-" + name}, command...)
	producer := exec.CommandContext(ctx, name, args...)
	cat := exec.CommandContext(ctx, "cat")
	pipe, err := producer.StdoutPipe()
	if err != nil {
		return 0, err
	}
	cat.Stdin = pipe
	out, err := cat.StdoutPipe()
	if err != nil {
		return 0, err
	}
	if err := errors.Join(producer.Start(), cat.Start()); err != nil {
		return 0, err
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
	return total, errors.Join(cat.Wait(), producer.Wait())
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
