package microvm

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

// hostBoot is where distributions put kernels.
const hostBoot = "/boot"

// guest is what every VM of a runtime boots: made once, kept below the state directory by content, shared by all.
type guest struct {
	// Of the vmlinuz it is made of.
	kernelPath string
	kernelHash string
	release    string
	// Paths of the files QEMU is given, the first as it is, the second with a boot file added.
	vmlinuxPath   string
	initramfsPath string
	// To load, in order, as paths in the initramfs.
	modules []string
	// After those, where there is a network.
	networkModules []string
	// Why there can be no network; nil if there can.
	networkErr error
	// To load after those where the agent speaks over a port; empty if the kernel has the driver neither built in nor as
	// a module, or has it built in.
	portModules []string
}

// prepareGuest makes what is missing below dir (state-dir/microvm). vmlinuz may be empty: then the host's newest
// suitable kernel is taken.
func prepareGuest(dir, vmlinuz, agent string) (*guest, error) {
	vmlinuz, err := findKernel(vmlinuz, hostBoot)
	if err != nil {
		return nil, err
	}
	// Kernel, modules and agent pass through memory once, 150 MB of it, which the daemon would otherwise keep for long.
	defer debug.FreeOSMemory()
	g := &guest{kernelPath: vmlinuz}
	if err := g.prepareKernel(filepath.Join(dir, "kernel")); err != nil {
		return nil, fmt.Errorf("cannot use the guest kernel %s: %w", vmlinuz, err)
	}
	if err := g.prepareInitramfs(filepath.Join(dir, "initramfs"), agent); err != nil {
		return nil, err
	}
	return g, nil
}

// findKernel resolves which vmlinuz to boot.
func findKernel(configured, boot string) (string, error) {
	if configured != "" {
		if _, err := os.Stat(configured); err != nil {
			return "", spec.Errorf(spec.KindUnsupported, "cannot find the guest kernel: %w; --vm-kernel must name a vmlinuz", err)
		}
		return filepath.Abs(configured)
	}
	// The cloud kernel has what a VM needs and boots in half the time.
	for _, pattern := range []string{"vmlinuz-*-cloud-amd64", "vmlinuz-*"} {
		found, err := filepath.Glob(filepath.Join(boot, pattern))
		if err != nil {
			return "", fmt.Errorf("cannot look for a guest kernel: %w", err)
		}
		if len(found) > 0 {
			return slices.MaxFunc(found, compareVersions), nil
		}
	}
	return "", spec.Errorf(spec.KindUnsupported, "no guest kernel: there is no %s/vmlinuz-*; install linux-image-cloud-amd64, or name a vmlinuz with --vm-kernel", boot)
}

// compareVersions orders names in which runs of digits count as numbers: 6.1.0-9 before 6.1.0-10.
func compareVersions(a, b string) int {
	for a != "" && b != "" {
		x, restA := leadingRun(a)
		y, restB := leadingRun(b)
		if isDigit(x[0]) && isDigit(y[0]) {
			x, y = strings.TrimLeft(x, "0"), strings.TrimLeft(y, "0")
			if len(x) != len(y) {
				return len(x) - len(y)
			}
		}
		if c := strings.Compare(x, y); c != 0 {
			return c
		}
		a, b = restA, restB
	}
	return len(a) - len(b)
}

func isDigit(c byte) bool { return c >= '0' && c <= '9' }

// leadingRun splits a non-empty s after its first run of digits or of anything else.
func leadingRun(s string) (run, rest string) {
	i := 1
	for i < len(s) && isDigit(s[i]) == isDigit(s[0]) {
		i++
	}
	return s[:i], s[i:]
}

// prepareKernel unpacks the kernel into dir/<sha256 of the vmlinuz>/vmlinux, unless it is there.
func (g *guest) prepareKernel(dir string) error {
	image, err := wholefile.Read(g.kernelPath, maxKernelImage)
	if err != nil {
		return err
	}
	sum := sha256.Sum256(image)
	g.kernelHash = hex.EncodeToString(sum[:])
	cache := filepath.Join(dir, g.kernelHash)
	g.vmlinuxPath = filepath.Join(cache, "vmlinux")
	// Beside it: written last, so that what it speaks of is whole.
	releasePath := filepath.Join(cache, "release")

	if release, err := os.ReadFile(releasePath); err == nil {
		g.release = string(release)
		return nil
	}
	kernel, err := parseKernel(image)
	if err != nil {
		return err
	}
	g.release = kernel.release
	// QEMU reads it unprivileged, through a descriptor: no path leads through the private directories above.
	if err := writeFileDurable(g.vmlinuxPath, kernel.vmlinux, 0o444); err != nil {
		return err
	}
	fault.At("vm guest", "kernel written")
	if err := writeFileDurable(releasePath, []byte(kernel.release), 0o400); err != nil {
		return err
	}
	return removeOthers(dir, cache)
}

// prepareInitramfs makes dir/<sha256>.cpio, unless it is there.
func (g *guest) prepareInitramfs(dir, agentPath string) error {
	agent, err := wholefile.Read(agentPath, maxAgent)
	if err != nil {
		return fmt.Errorf("cannot read the agent: %w", err)
	}
	modulesDir, err := findModules(g.kernelPath, g.release)
	if err != nil {
		return err
	}
	tree, err := openModuleTree(modulesDir)
	if err != nil {
		return err
	}
	modules, err := tree.load()
	if err != nil {
		return err
	}
	g.networkErr = tree.networkErr
	for _, m := range modules {
		if m.port {
			g.portModules = append(g.portModules, modulePath(m))
		} else if m.network {
			g.networkModules = append(g.networkModules, modulePath(m))
		} else {
			g.modules = append(g.modules, modulePath(m))
		}
	}
	archive := baseInitramfs(agent, modules)
	sum := sha256.Sum256(archive)
	g.initramfsPath = filepath.Join(dir, hex.EncodeToString(sum[:])+".cpio")
	if _, err := os.Stat(g.initramfsPath); err == nil {
		return nil
	}
	if err := writeFileDurable(g.initramfsPath, archive, 0o400); err != nil {
		return err
	}
	return removeOthers(dir, g.initramfsPath)
}

// removeOthers deletes what belongs to agents and kernels that were replaced. VMs have it open, or a copy of their own.
func removeOthers(dir, keep string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("cannot clean up %s: %w", dir, err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if path == keep {
			continue
		}
		if err := os.RemoveAll(path); err != nil {
			return fmt.Errorf("cannot clean up %s: %w", dir, err)
		}
	}
	return nil
}

// unfinishedPrefix begins the names of files that are being written.
const unfinishedPrefix = ".new-"

// removeUnfinished deletes the files below dir that a daemon was writing when it died. Nobody may be writing there.
func removeUnfinished(dir string) error {
	return filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() && strings.HasPrefix(e.Name(), unfinishedPrefix) {
			err = os.Remove(path)
		}
		if err != nil {
			return fmt.Errorf("cannot remove what an earlier daemon left half written: %w", err)
		}
		return nil
	})
}

// writeFileDurable is writeFileAtomic for what must be whole after a crash of the host, too.
func writeFileDurable(path string, data []byte, perm fs.FileMode) error {
	return writeFile(path, data, perm, (*os.File).Sync)
}

// writeFileAtomic makes the file's directory and the file, which is whole when it appears.
func writeFileAtomic(path string, data []byte, perm fs.FileMode) error {
	return writeFile(path, data, perm, func(*os.File) error { return nil })
}

func writeFile(path string, data []byte, perm fs.FileMode, finish func(*os.File) error) error {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	f, err := os.CreateTemp(dir, unfinishedPrefix+"*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Chmod(perm)
	}
	if err == nil {
		err = finish(f)
	}
	fault.At("vm guest", "half written")
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("cannot write %s: %w", path, err), os.Remove(f.Name()))
	}
	return nil
}
