package cgroup

import (
	"fmt"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/containerd/cgroups/v3/cgroup2"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// attachDevices has the kernel ask a program about each device node that the group's processes open: cgroup v2 has no files for
// it. The program is containerd/cgroups', which would attach it too, but keeps a descriptor of it until the next garbage collection.
func attachDevices(path string, rules []specs.LinuxDeviceCgroup) error {
	if len(rules) == 0 {
		return nil
	}
	instructions, license, err := cgroup2.DeviceFilter(rules)
	if err != nil {
		return fmt.Errorf("cannot compile the list of devices: %w", err)
	}
	program, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.CGroupDevice, Instructions: instructions, License: license})
	if err != nil {
		return fmt.Errorf("cannot load the list of devices: %w", err)
	}
	defer program.Close() //nolint:errcheck // the group has it
	dir, err := unix.Open(filepath.Join(root, path), unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(dir) //nolint:errcheck // only a name
	err = link.RawAttachProgram(link.RawAttachProgramOptions{
		Target: dir, Program: program, Attach: ebpf.AttachCGroupDevice, Flags: unix.BPF_F_ALLOW_MULTI,
	})
	if err != nil {
		return fmt.Errorf("cannot attach the list of devices: %w", err)
	}
	return nil
}
