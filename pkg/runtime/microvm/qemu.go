package microvm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// qemuName is looked for in PATH.
const qemuName = "qemu-system-x86_64"

// versionTimeout bounds asking QEMU for its version, which takes 20 ms.
const versionTimeout = 5 * time.Second

// qemuPath is the QEMU to run.
func (r *Runtime) qemuPath() (string, error) {
	name := r.cfg.QEMU
	if name == "" {
		name = qemuName
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", spec.Errorf(spec.KindUnsupported, "cannot find QEMU: %w; install qemu-system-x86", err)
	}
	return filepath.Abs(path)
}

// qemuVersion asks QEMU for its version.
func (r *Runtime) qemuVersion(ctx context.Context) (string, error) {
	path, err := r.qemuPath()
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, versionTimeout)
	defer cancel()
	out, err := exec.CommandContext(ctx, path, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("cannot run %s: %w", path, err)
	}
	line, _, _ := strings.Cut(string(out), "\n")
	return strings.TrimPrefix(line, "QEMU emulator version "), nil
}

// firmware is qboot, which is part of QEMU, where it is found; otherwise QEMU takes its own default, which works too.
func firmware(qemu string) string {
	for _, dir := range []string{filepath.Join(filepath.Dir(qemu), "..", "share", "qemu"), "/usr/share/qemu"} {
		path := filepath.Join(dir, "qboot.rom")
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	return ""
}
