package microvm

import (
	"cmp"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/bootid"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

// KVM counts only once a guest has been seen to run under it: on some hosts /dev/kvm opens and makes a machine, and a
// stock kernel then never comes up.

const (
	// kvmTrial bounds the guest that tries KVM out, if the configuration doesn't. Seen: 2.7 s where KVM itself was emulated; on hardware well below 1 s.
	kvmTrial = 10 * time.Second
	// kvmTrialMemory and kvmTrialCPUs are of that guest.
	kvmTrialMemory = 128 << 20
	kvmTrialCPUs   = 1000
	kvmDevice      = "/dev/kvm"
	verdictFile    = "accel.json"
	// verdictFormat changes when what a verdict means does.
	verdictFormat = 1
	// kvmAPIVersion and the request for it are of the kernel's linux/kvm.h.
	kvmGetAPIVersion = 0xae00
	kvmAPIVersion    = 12
)

// kvmVerdict is whether KVM works here, and why.
type kvmVerdict struct {
	Works bool `json:"works"`
	// One sentence without its full stop.
	Reason string `json:"reason"`
	// What to do; empty if it works.
	Advice string `json:"advice,omitempty"`
	// What the verdict holds for: this kernel, this QEMU, this boot of the host.
	Key string `json:"key"`
	// A guest was tried; otherwise something before that was missing, which is quickly looked at again.
	Tried bool `json:"tried"`
}

// accelerator decides under what a VM runs.
func (r *Runtime) accelerator(ctx context.Context) (string, error) {
	accel, reason, err := r.chooseAccelerator(ctx)
	if err != nil {
		return "", err
	}
	if accel == "" {
		return "", spec.Errorf(spec.KindUnsupported, "cannot start microVM: %s", reason).WithReason(spec.ReasonUnsatisfiable)
	}
	return accel, nil
}

// chooseAccelerator answers with the accelerator, empty where none is allowed, and why.
func (r *Runtime) chooseAccelerator(ctx context.Context) (accel, reason string, err error) {
	if r.cfg.Accel == AccelTCG {
		return accelTCG, "software emulation, because sandboxd runs with --vm-accel tcg", nil
	}
	v, err := r.kvm(ctx)
	switch {
	case err != nil:
		return "", "", err
	case v.Works:
		return accelKVM, v.Reason, nil
	case r.cfg.Accel == AccelAuto:
		return accelTCG, "software emulation, because " + v.Reason, nil
	default:
		return "", v.Reason + ": " + v.Advice + ", or allow software emulation, for which QEMU promises no security, with --vm-accel auto", nil
	}
}

// kvm says whether KVM works, by trying it out once for each kernel, QEMU and boot of the host. An error is not a
// verdict: the caller gave up, or the daemon's own files failed.
func (r *Runtime) kvm(ctx context.Context) (kvmVerdict, error) {
	r.kvmMu.Lock()
	defer r.kvmMu.Unlock()
	if v := lookAtKVM(); !v.Works {
		return v, nil
	}
	if r.kvmSeen != nil {
		return *r.kvmSeen, nil
	}
	g, err := r.guest()
	if err != nil {
		return kvmVerdict{}, err
	}
	key, err := r.verdictKey(g)
	if err != nil {
		return kvmVerdict{}, err
	}
	path := filepath.Join(r.cfg.StateDir, "microvm", verdictFile)
	v, ok := loadVerdict(path, key)
	if !ok {
		if v, err = r.tryKVM(ctx, g); err != nil {
			return kvmVerdict{}, err
		}
		v.Key = key
		b, err := json.Marshal(v)
		if err == nil {
			err = writeFileAtomic(path, b, 0o600)
		}
		if err != nil {
			return kvmVerdict{}, fmt.Errorf("cannot keep what was seen of KVM: %w", err)
		}
	}
	r.kvmSeen = &v
	return v, nil
}

// lookAtKVM looks at all that takes no guest.
func lookAtKVM() kvmVerdict {
	fd, err := unix.Open(kvmDevice, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return kvmVerdict{Reason: "there is no " + kvmDevice, Advice: "load the module kvm_intel or kvm_amd, and enable virtualization in the firmware (or nested virtualization of the hypervisor)"}
	}
	if err != nil {
		return kvmVerdict{Reason: fmt.Sprintf("%s does not open (%v)", kvmDevice, err), Advice: "enable virtualization in the firmware"}
	}
	defer unix.Close(fd) //nolint:errcheck // only looked at
	if v, err := unix.IoctlRetInt(fd, kvmGetAPIVersion); err != nil || v != kvmAPIVersion {
		return kvmVerdict{Reason: fmt.Sprintf("%s does not speak KVM's API %d", kvmDevice, kvmAPIVersion), Advice: "use the kernel's own KVM"}
	}
	if _, err := kvmGroups(); err != nil {
		return kvmVerdict{Reason: err.Error(), Advice: "run chgrp kvm " + kvmDevice + " && chmod 0660 " + kvmDevice}
	}
	return kvmVerdict{Works: true}
}

// kvmGroups are the groups by which an unprivileged QEMU may open /dev/kvm: none are needed where everyone may.
func kvmGroups() ([]uint32, error) {
	info, err := os.Stat(kvmDevice)
	if err != nil {
		return nil, err
	}
	const readWrite = 0o6
	mode, gid := info.Mode().Perm(), info.Sys().(*syscall.Stat_t).Gid
	switch {
	case mode&readWrite == readWrite:
		return nil, nil
	case mode>>3&readWrite == readWrite && gid != 0:
		return []uint32{gid}, nil
	default:
		return nil, fmt.Errorf("only root may open %s (mode %#o, group %d), and QEMU runs unprivileged", kvmDevice, mode, gid)
	}
}

// tryKVM boots a guest without disks under KVM until its agent answers, and removes it.
func (r *Runtime) tryKVM(ctx context.Context, g *guest) (kvmVerdict, error) {
	id := make([]byte, 16)
	if _, err := rand.Read(id); err != nil {
		return kvmVerdict{}, fmt.Errorf("cannot draw an id: %w", err)
	}
	b := &boot{r: r, guest: g, accel: accelKVM, timeout: cmp.Or(r.cfg.KVMTrial, kvmTrial), sandbox: spec.Sandbox{
		ID:        hex.EncodeToString(id),
		Resources: spec.Resources{CPUMillis: kvmTrialCPUs, MemoryBytes: kvmTrialMemory},
	}}
	began := time.Now()
	_, err := b.run(ctx)
	took := time.Since(began).Round(time.Millisecond)
	if ctx.Err() != nil {
		return kvmVerdict{}, fmt.Errorf("cannot try out KVM: %w", ctx.Err())
	}
	if err != nil {
		return kvmVerdict{Tried: true,
			Reason: fmt.Sprintf("%s opens, but a guest that was tried did not come up under it (%v)", kvmDevice, err),
			Advice: "run on hardware, or on a hypervisor whose nested virtualization works"}, nil
	}
	undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	if err := r.destroy(undo, b.sandbox.ID, false); err != nil {
		return kvmVerdict{}, fmt.Errorf("cannot remove the guest that tried out KVM: %w", err)
	}
	return kvmVerdict{Works: true, Tried: true, Reason: fmt.Sprintf("a guest was seen to come up under KVM in %v", took)}, nil
}

// verdictKey names what a verdict depends on.
func (r *Runtime) verdictKey(g *guest) (string, error) {
	boot, err := bootid.Host()
	if err != nil {
		return "", err
	}
	path, err := r.qemuPath()
	if err != nil {
		return "", err
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("cannot examine QEMU: %w", err)
	}
	sum := sha256.Sum256(fmt.Appendf(nil, "%d %s %s %s %d %d", verdictFormat, boot, g.kernelHash, path, info.Size(), info.ModTime().UnixNano()))
	return hex.EncodeToString(sum[:]), nil
}

// loadVerdict reads the verdict for key, if it is there. A damaged file is as good as none.
func loadVerdict(path, key string) (v kvmVerdict, ok bool) {
	b, err := wholefile.Read(path, maxRecord)
	if err != nil || json.Unmarshal(b, &v) != nil {
		return kvmVerdict{}, false
	}
	return v, v.Key == key
}
