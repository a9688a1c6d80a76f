package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// benchMemory starts a crowd of sleepers behind each wall and adds up, on the host, the proportional set size of every process
// that is ours: agents, VMMs, helpers, not the workload's own.
func benchMemory(ctx context.Context, b *bench) ([]row, error) {
	d := b.d
	group := fmt.Sprintf("memory, %d sandboxes at once", b.crowd)
	var rows []row
	for _, kind := range []struct {
		name, includes string
		isolation      sandboxdv1.Isolation
	}{
		{"container, each", "PSS on the host of the agent; the workload's own process apart", container},
		{"vm, each", "PSS on the host of QEMU and its vsock helper, guest memory in use included", vm},
	} {
		before, err := rss(d.cmd.Process.Pid)
		if err != nil {
			return nil, err
		}
		ids, err := d.crowd(ctx, kind.isolation, b.crowd)
		if err != nil {
			return nil, err
		}
		values, err := d.pss(ctx, ids)
		if err != nil {
			return nil, err
		}
		after, err := rss(d.cmd.Process.Pid)
		if err != nil {
			return nil, err
		}
		rows = append(rows, newRow(group, kind.name, "MiB", kind.includes, values),
			newRow(group, "daemon RSS, "+strings.TrimSuffix(kind.name, ", each")+"s", "MiB",
				fmt.Sprintf("sandboxd with %d such; %.1f MiB before", b.crowd, before), []float64{after}))
		for _, id := range ids {
			if err := d.delete(ctx, id); err != nil {
				return nil, err
			}
		}
	}
	return rows, nil
}

func (d *daemon) crowd(ctx context.Context, isolation sandboxdv1.Isolation, n int) ([]string, error) {
	var ids []string
	for range n {
		id, err := d.start(ctx, isolation, "sleep")
		if err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return ids, nil
}

// pss is the MiB of each sandbox's processes of ours: those of the cgroup of its first host process that run one of our
// programs or QEMU.
func (d *daemon) pss(ctx context.Context, ids []string) ([]float64, error) {
	var out []float64
	for _, id := range ids {
		w, err := d.workloads.GetWorkload(ctx, &sandboxdv1.GetWorkloadRequest{Id: id})
		if err != nil {
			return nil, err
		}
		pids, err := sameCgroup(int(w.GetWorkload().GetStatus().GetHostPid()))
		if err != nil {
			return nil, err
		}
		total := 0.0
		for _, pid := range pids {
			if !isOurs(pid) {
				continue
			}
			kib, err := field(fmt.Sprintf("/proc/%d/smaps_rollup", pid), "Pss:")
			if err != nil {
				return nil, err
			}
			total += kib / 1024
		}
		if total == 0 {
			return nil, fmt.Errorf("found no process of sandbox %s to weigh", id)
		}
		out = append(out, total)
	}
	return out, nil
}

func isOurs(pid int) bool {
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return false
	}
	name, _, _ := strings.Cut(string(comm), "\x00")
	switch base := filepath.Base(name); {
	case strings.HasPrefix(base, "sandbox-"), strings.HasPrefix(base, "qemu-system"):
		return true
	}
	return false
}

// sameCgroup lists the processes of the cgroup that a process is in.
func sameCgroup(pid int) ([]int, error) {
	f, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(f)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(parts) != 3 || parts[2] == "/" {
			continue
		}
		for _, root := range []string{"/sys/fs/cgroup/" + parts[1], "/sys/fs/cgroup"} {
			b, err := os.ReadFile(filepath.Join(root, parts[2], "cgroup.procs"))
			if err != nil {
				continue
			}
			var pids []int
			for p := range strings.FieldsSeq(string(b)) {
				n, err := strconv.Atoi(p)
				if err != nil {
					return nil, err
				}
				pids = append(pids, n)
			}
			return pids, nil
		}
	}
	return nil, fmt.Errorf("process %d is in no cgroup of its own", pid)
}

func rss(pid int) (float64, error) {
	kib, err := field(fmt.Sprintf("/proc/%d/status", pid), "VmRSS:")
	return kib / 1024, err
}

// field reads a line `Name:   123 kB`.
func field(path, name string) (float64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if rest, ok := strings.CutPrefix(s.Text(), name); ok {
			return strconv.ParseFloat(strings.Fields(rest)[0], 64)
		}
	}
	return 0, fmt.Errorf("no %s in %s", name, path)
}
