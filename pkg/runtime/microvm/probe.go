package microvm

import (
	"context"
	"fmt"
	"os"
	"os/exec"

	"github.com/sandboxd/sandboxd/pkg/runtime"
)

// Results of a check.
const (
	checkOK      = "ok"
	checkWarning = "warning"
	checkFailed  = "failed"
)

// Probe implements runtime.Prober. The first call on a host may try out KVM, for at most kvmTrial.
func (r *Runtime) Probe(ctx context.Context) runtime.Availability {
	var a runtime.Availability
	for _, look := range []func(context.Context, *runtime.Availability) runtime.Check{
		r.checkQEMU, r.checkKernel, r.checkAgent, r.checkKVM, r.checkVsock, r.checkDisk, r.checkNetworkCard, r.checkTemplates, r.checkAccelerator,
	} {
		c := look(ctx, &a)
		a.Checks = append(a.Checks, c)
		if c.Result == checkFailed && a.Reason == "" {
			a.Reason = c.Finding
			if c.Advice != "" {
				a.Reason += ": " + c.Advice
			}
		}
	}
	if a.Reason == "" {
		a.Available = true
		a.Reason = fmt.Sprintf("microVMs run under %s, with vsock over %s", a.Accelerator, a.AgentTransport)
	}
	return a
}

// failed is a check's result when a thing without which nothing starts is missing.
func failed(name string, finding error, advice string) runtime.Check {
	return runtime.Check{Name: name, Result: checkFailed, Finding: finding.Error(), Advice: advice}
}

func (r *Runtime) checkQEMU(ctx context.Context, a *runtime.Availability) runtime.Check {
	version, err := r.qemuVersion(ctx)
	if err != nil {
		return failed("qemu", err, "install qemu-system-x86, or name QEMU in sandboxd's configuration")
	}
	a.VMMVersion = version
	return runtime.Check{Name: "qemu", Result: checkOK, Finding: "QEMU " + version}
}

func (r *Runtime) checkKernel(_ context.Context, a *runtime.Availability) runtime.Check {
	if _, err := os.Stat(r.cfg.Agent); err != nil {
		// Said by the next check; the kernel alone is still worth looking at.
		path, ferr := findKernel(r.cfg.Kernel, hostBoot)
		if ferr != nil {
			return failed("guest kernel", ferr, "")
		}
		return runtime.Check{Name: "guest kernel", Result: checkOK, Finding: path}
	}
	g, err := r.guest()
	if err != nil {
		return failed("guest kernel", err, "")
	}
	a.GuestKernel = g.kernelPath
	return runtime.Check{Name: "guest kernel", Result: checkOK, Finding: fmt.Sprintf("%s (%s) with %d modules", g.kernelPath, g.release, len(g.modules))}
}

// checkNetworkCard only warns: network none needs none of it.
func (r *Runtime) checkNetworkCard(context.Context, *runtime.Availability) runtime.Check {
	const name = "network cards"
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		return runtime.Check{Name: name, Result: checkWarning, Finding: err.Error(), Advice: "load the kernel module tun: VMs can be joined to no network without it"}
	}
	if g, err := r.guest(); err == nil && g.networkErr != nil {
		return runtime.Check{Name: name, Result: checkWarning, Finding: g.networkErr.Error(), Advice: "use a guest kernel that has it: VMs can be joined to no network without it"}
	}
	return runtime.Check{Name: name, Result: checkOK, Finding: "VMs can be joined to networks by /dev/net/tun"}
}

// checkTemplates says what there is.
func (r *Runtime) checkTemplates(context.Context, *runtime.Availability) runtime.Check {
	const name = "templates"
	if r.templates == nil {
		return runtime.Check{Name: name, Result: checkOK, Finding: "off: each VM is booted"}
	}
	all := r.templates.list()
	finding := fmt.Sprintf("%d of at most %d", len(all), r.templates.config.Max)
	if size := r.pool.c.Size; size > 0 {
		waiting := 0
		for _, t := range all {
			waiting += r.pool.waiting(templateKey(t.ID))
		}
		finding += fmt.Sprintf("; %d clones wait, %d are kept for each kind of VM that was started", waiting, size)
	}
	return runtime.Check{Name: name, Result: checkOK, Finding: finding}
}

func (r *Runtime) checkAgent(context.Context, *runtime.Availability) runtime.Check {
	if _, err := os.Stat(r.cfg.Agent); err != nil {
		return failed("sandbox-agent", fmt.Errorf("cannot find the agent: %w", err), "install sandbox-agent beside sandboxd")
	}
	return runtime.Check{Name: "sandbox-agent", Result: checkOK, Finding: r.cfg.Agent}
}

// checkKVM only warns: whether it is needed is the accelerator's check.
func (r *Runtime) checkKVM(ctx context.Context, _ *runtime.Availability) runtime.Check {
	if r.cfg.Accel == AccelTCG {
		return runtime.Check{Name: "kvm", Result: checkOK, Finding: "not looked at: sandboxd runs with --vm-accel tcg"}
	}
	v, err := r.kvm(ctx)
	switch {
	case err != nil:
		return runtime.Check{Name: "kvm", Result: checkWarning, Finding: err.Error()}
	case !v.Works:
		return runtime.Check{Name: "kvm", Result: checkWarning, Finding: v.Reason, Advice: v.Advice}
	}
	return runtime.Check{Name: "kvm", Result: checkOK, Finding: v.Reason}
}

func (r *Runtime) checkVsock(_ context.Context, a *runtime.Availability) runtime.Check {
	if r.hub != nil {
		a.AgentTransport = transportKernel
		return runtime.Check{Name: "vsock", Result: checkOK, Finding: "the kernel's, by /dev/vhost-vsock"}
	}
	path, err := exec.LookPath(r.cfg.VsockHelper)
	if err != nil {
		return failed("vsock", fmt.Errorf("neither the kernel's vsock (%w) nor the vsock helper (%w) can be used", r.hubErr, err),
			"load the module vhost_vsock, or install sandbox-vsock beside sandboxd")
	}
	a.AgentTransport = transportVhostUser
	return runtime.Check{Name: "vsock", Result: checkOK, Finding: fmt.Sprintf("by the helper %s, because the kernel's cannot be used (%v)", path, r.hubErr)}
}

func (r *Runtime) checkDisk(context.Context, *runtime.Availability) runtime.Check {
	for _, program := range []string{"mkfs.ext4", "e2fsck"} {
		if _, err := exec.LookPath(program); err != nil {
			return failed("writable layers", err, "install e2fsprogs")
		}
	}
	return runtime.Check{Name: "writable layers", Result: checkOK, Finding: "mkfs.ext4 and e2fsck are there"}
}

func (r *Runtime) checkAccelerator(ctx context.Context, a *runtime.Availability) runtime.Check {
	accel, reason, err := r.chooseAccelerator(ctx)
	if err != nil {
		return failed("accelerator", err, "")
	}
	a.Accelerator, a.AcceleratorReason = accel, reason
	switch accel {
	case accelKVM:
		return runtime.Check{Name: "accelerator", Result: checkOK, Finding: reason}
	case accelTCG:
		return runtime.Check{Name: "accelerator", Result: checkWarning, Finding: reason, Advice: "use it for development and tests only: QEMU promises no security under software emulation"}
	default:
		return failed("accelerator", fmt.Errorf("%s", reason), "")
	}
}
