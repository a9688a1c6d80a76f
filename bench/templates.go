package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// fromTemplate is what the status of a clone says.
const fromTemplate = "template"

// benchTemplates measures clones, of a second sandboxd with --vm-templates on, beside booted VMs of the first and podman.
func benchTemplates(ctx context.Context, b *bench) (rows []row, err error) {
	o := b.options
	o.templates = true
	d, err := startDaemon(ctx, o, b.dir)
	if err != nil {
		return nil, err
	}
	defer d.stop()
	_, err = sandboxdv1.NewTemplateServiceClient(d.conn).BuildTemplate(ctx, &sandboxdv1.BuildTemplateRequest{
		Image: benchImage, Resources: &sandboxdv1.Resources{MemoryBytes: 256 << 20},
	})
	if err != nil {
		return nil, err
	}
	subjects := []subject{
		{name: "sandboxd vm, a clone", includes: "gRPC create, start, wait, delete; clone of a template, agent, disks, confinement in the guest, durable record",
			do: func(ctx context.Context, c string) (int, error) { return d.run(ctx, vm, c) }},
		{name: "sandboxd vm, booted", includes: "the same without a template",
			do: func(ctx context.Context, c string) (int, error) { return b.d.run(ctx, vm, c) }},
	}
	if podman, perr := b.p.podman(ctx, b); perr == nil {
		subjects = append(subjects, podman)
	} else {
		return nil, perr
	}
	if rows, err = measure(ctx, "VM from a template: create to exit, /bin/true", b.vmRuns, subjects); err != nil {
		return nil, err
	}
	many, err := b.manyClones(ctx, d)
	return append(rows, many...), err
}

// manyClones holds many clones at once: how long each took to start, whether each answers an exec, and what one weighs when
// it is fresh.
func (b *bench) manyClones(ctx context.Context, d *daemon) (rows []row, err error) {
	var ids []string
	defer func() { err = errors.Join(err, d.deleteAll(context.WithoutCancel(ctx), ids)) }()
	var times, private []float64
	for n := range b.manyVMs {
		began := time.Now()
		id, err := d.start(ctx, vm, "sleep")
		if id != "" {
			ids = append(ids, id)
		}
		if err != nil {
			return nil, fmt.Errorf("clone %d: %w", n+1, err)
		}
		times = append(times, ms(time.Since(began)))
		if n < b.crowd {
			mib, err := d.privateMiB(ctx, id)
			if err != nil {
				return nil, err
			}
			private = append(private, mib)
		}
	}
	var execs []float64
	for _, id := range ids {
		began := time.Now()
		if code, err := d.exec(ctx, id, "exit7"); err != nil || code != 7 {
			return nil, fmt.Errorf("exec in clone %s exited with %d: %w", id, code, err)
		}
		execs = append(execs, ms(time.Since(began)))
	}
	group := fmt.Sprintf("%d VMs from a template at once", len(ids))
	ends := max(len(times)/5, 1) // single starts scatter
	first, last := times[:ends], times[len(times)-ends:]
	r := newRow(group, "the last ones' start", "ms", fmt.Sprintf("ratio to the first %d: %d each, while the others sleep", ends, ends), slices.Clone(last))
	f := newRow(group, "the first ones' start", "ms", "gRPC create and start", slices.Clone(first))
	f.Ratio = r.Median / f.Median
	return []row{f, r,
		newRow(group, "first exec in each", "ms", "exit status checked; the guest has not run an exec before", execs),
		newRow(group, "private memory, fresh", "MiB", "what no other process shares, of QEMU and our programs, the guest's included", private)}, nil
}

// privateMiB is what the processes of a sandbox that are ours share with no other.
func (d *daemon) privateMiB(ctx context.Context, id string) (total float64, err error) {
	w, err := d.workloads.GetWorkload(ctx, &sandboxdv1.GetWorkloadRequest{Id: id})
	if err != nil {
		return 0, err
	}
	if s := w.GetWorkload().GetStatus(); s.GetStartedFrom() != fromTemplate {
		return 0, fmt.Errorf("%s started from %q, not from a template: %s", id, s.GetStartedFrom(), s.GetStartNote())
	}
	pids, err := sameCgroup(int(w.GetWorkload().GetStatus().GetHostPid()))
	if err != nil {
		return 0, err
	}
	for _, pid := range pids {
		for _, name := range []string{"Private_Clean:", "Private_Dirty:"} {
			kib, err := field(fmt.Sprintf("/proc/%d/smaps_rollup", pid), name)
			if err != nil {
				return 0, err
			}
			total += kib / 1024
		}
	}
	return total, nil
}

// place makes a directory for a daemon besides the first of a run, and answers with its part of names.
func (o options) place(dir string) (string, string) {
	var kind []string
	if o.pool > 0 {
		kind = append(kind, "pool")
	}
	if o.templates {
		kind = append(kind, "templates")
	}
	if o.large {
		kind = append(kind, "large")
	}
	if len(kind) == 0 {
		return dir, "plain"
	}
	name := strings.Join(kind, "-")
	return filepath.Join(dir, name), name
}
