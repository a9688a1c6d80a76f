package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

const vm = sandboxdv1.Isolation_ISOLATION_VM

// floorInit is the smallest init there is: it ends the VM, which with -no-reboot ends QEMU.
const floorInit = `
#include <sys/reboot.h>
#include <unistd.h>
int main(void) { reboot(RB_AUTOBOOT); for (;;) pause(); }
`

// benchVMs measures whole lives of VMs beside the floor: bare QEMU with the machine, processor, kernel and kernel command line
// of one of ours, and an init that exits.
func benchVMs(ctx context.Context, b *bench) ([]row, error) {
	d := b.d
	floor, err := floorCommand(ctx, d, b.dir)
	if err != nil {
		return nil, err
	}
	rows, err := measure(ctx, "VM: create to exit, /bin/true", b.vmRuns, []subject{{
		name: "sandboxd vm", includes: "gRPC RunWorkload to its removal; boot, agent, disks, confinement in the guest, durable record",
		do: func(ctx context.Context, c string) (int, error) { return d.run(ctx, vm, c) },
	}})
	if err != nil {
		return nil, err
	}
	// A VM whose init only reboots has no exit code to check: QEMU's own must be 0 each time.
	floorRows, err := measureFloor(ctx, b.vmRuns, floor)
	if err != nil {
		return nil, err
	}
	floorRows.Ratio = rows[0].Median / floorRows.Median
	return append(rows, floorRows), nil
}

func measureFloor(ctx context.Context, runs int, floor []string) (row, error) {
	s := subject{name: "bare QEMU", do: func(ctx context.Context, _ string) (int, error) {
		return exitCode(exec.CommandContext(ctx, floor[0], floor[1:]...))
	}}
	var times []float64
	for i := range runs + 1 {
		took, err := once(ctx, s, "true", 0)
		if err != nil {
			return row{}, err
		}
		if i > 0 { // the first warms the cache
			times = append(times, float64(took.Microseconds())/1000)
		}
	}
	return newRow("VM: create to exit, /bin/true", s.name, "ms", "same machine, kernel and kernel command line; static init that reboots; no disks, no vsock", times), nil
}

// floorCommand is QEMU's command line with what matters of that of a VM of ours, and the floor's init.
func floorCommand(ctx context.Context, d *daemon, dir string) ([]string, error) {
	id, err := d.start(ctx, vm, "sleep")
	if err != nil {
		return nil, err
	}
	defer func() { _ = d.delete(ctx, id) }()
	w, err := d.workloads.GetWorkload(ctx, &sandboxdv1.GetWorkloadRequest{Id: id})
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", w.GetWorkload().GetStatus().GetHostPid()))
	if err != nil {
		return nil, err
	}
	args := strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
	kernels, err := filepath.Glob(filepath.Join(d.stateDir, "microvm/kernel/*/vmlinux"))
	if err != nil || len(kernels) == 0 {
		return nil, errors.New("no uncompressed kernel in the state directory")
	}
	initrd, err := floorInitrd(ctx, dir)
	if err != nil {
		return nil, err
	}
	out := []string{"qemu-system-x86_64"}
	for _, option := range []string{"-M", "-machine", "-accel", "-cpu", "-smp", "-m", "-bios", "-append"} {
		if i := slices.Index(args, option); i >= 0 && i+1 < len(args) {
			value := args[i+1]
			if option == "-M" || option == "-machine" {
				value = dropMemoryBackend(value)
			}
			out = append(out, option, value)
		}
	}
	if !slices.Contains(out, "-append") {
		return nil, fmt.Errorf("cannot find the kernel's command line among QEMU's arguments: %q", args)
	}
	return append(out, "-m", "256M", "-kernel", kernels[0], "-initrd", initrd,
		"-nodefaults", "-no-user-config", "-nographic", "-no-reboot"), nil
}

func dropMemoryBackend(machine string) string {
	return strings.Join(slices.DeleteFunc(strings.Split(machine, ","), func(s string) bool {
		return strings.HasPrefix(s, "memory-backend=")
	}), ",")
}

// floorInitrd is a newc cpio archive of /init alone.
func floorInitrd(ctx context.Context, dir string) (string, error) {
	source, binary, out := filepath.Join(dir, "init.c"), filepath.Join(dir, "init"), filepath.Join(dir, "floor.cpio")
	if err := os.WriteFile(source, []byte(floorInit), 0o644); err != nil {
		return "", err
	}
	if err := command(ctx, "gcc", "-static", "-Os", "-s", "-o", binary, source); err != nil {
		return "", err
	}
	init, err := os.ReadFile(binary)
	if err != nil {
		return "", err
	}
	var b bytes.Buffer
	entry := func(name string, mode int, data []byte) {
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
			0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0)
		b.WriteString(name + "\x00")
		b.Write(make([]byte, -b.Len()&3))
		b.Write(data)
		b.Write(make([]byte, -b.Len()&3))
	}
	entry("init", 0o100755, init)
	entry("TRAILER!!!", 0, nil)
	return out, os.WriteFile(out, b.Bytes(), 0o644)
}
