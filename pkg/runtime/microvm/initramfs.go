package microvm

import (
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// maxAgent bounds the agent's binary, which lies in every guest's memory.
const maxAgent = 64 << 20

// Serial numbers by which the agent finds its disks: virtio-blk shows at most 20 bytes.
const (
	imageSerial = "sandbox-image"
	diskSerial  = "sandbox-disk"
)

// modulePath is where a module lies in the initramfs.
func modulePath(m module) string { return "/modules/" + m.name + ".ko" }

// baseInitramfs is the part that every guest of a kernel and an agent shares.
func baseInitramfs(agent []byte, modules []module) []byte {
	entries := []cpioEntry{
		cpioDir("dev", 0o755),
		// The kernel opens it for init's descriptors 0 to 2; without it they are closed and
		cpioDevice("dev/console", 0o600, 5, 1),
		// the Go runtime, which opens this one in their place, refuses to start.
		cpioDevice("dev/null", 0o666, 1, 3),
		cpioDir("proc", 0o555),
		cpioDir("sys", 0o555),
		cpioDir("modules", 0o700),
	}
	for _, m := range modules {
		entries = append(entries, cpioFile(modulePath(m)[1:], 0o400, m.data))
	}
	// Last: if the guest's memory is too small for the archive, the kernel says that init is missing.
	return cpioArchive(append(entries, cpioFile("init", 0o555, agent)))
}

// bootInitramfs is the part that is made for one boot.
func bootInitramfs(boot spec.VMBoot) ([]byte, error) {
	b, err := json.Marshal(boot)
	if err != nil {
		return nil, fmt.Errorf("cannot encode the boot file: %w", err)
	}
	return cpioArchive([]cpioEntry{cpioFile("boot.json", 0o400, b)}), nil
}

// vmBoot is what a guest is told. One that becomes a template is told no token.
func (g *guest) vmBoot(token bootToken, t transportRecord, network bool) spec.VMBoot {
	boot := spec.VMBoot{
		Version:     spec.ProtocolVersion,
		Modules:     g.modules,
		VsockPort:   t.Port,
		ImageSerial: imageSerial,
		DiskSerial:  diskSerial,
	}
	if token != (bootToken{}) {
		boot.Token = hex.EncodeToString(token[:])
	}
	if network {
		boot.Modules = slices.Concat(boot.Modules, g.networkModules)
	} else {
		boot.Unused = slices.Concat(boot.Unused, g.networkModules)
	}
	if t.Name == transportPort {
		boot.Modules = slices.Concat(boot.Modules, g.portModules)
		boot.Port = portName
	} else {
		boot.Unused = slices.Concat(boot.Unused, g.portModules)
	}
	return boot
}

// initramfs makes the initramfs of one boot, in memory: QEMU reads it once, and forgetInitramfs frees it. Only uid, as
// which QEMU runs, may read it.
func (g *guest) initramfs(boot spec.VMBoot, uid uint32) (_ *os.File, err error) {
	second, err := bootInitramfs(boot)
	if err != nil {
		return nil, err
	}
	f, err := newMemfd("initramfs")
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("cannot make the initramfs: %w", err), f.Close())
		}
	}()
	base, err := os.Open(g.initramfsPath)
	if err != nil {
		return nil, err
	}
	defer base.Close()
	if _, err := io.Copy(f, base); err != nil {
		return nil, err
	}
	if _, err := f.Write(second); err != nil {
		return nil, err
	}
	if err := f.Chmod(0o400); err != nil {
		return nil, err
	}
	return f, f.Chown(int(uid), int(uid))
}

// forgetInitramfs frees an initramfs whose guest has booted. QEMU keeps it mapped for a reboot that never happens
// (-no-reboot): without this every VM would cost its size, and the boot token would stay readable in QEMU's memory.
func forgetInitramfs(f *os.File) error {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return fmt.Errorf("cannot size the initramfs: %w", err)
	}
	page := int64(os.Getpagesize()) // whole pages: part of one would only be zeroed
	// Not truncated: QEMU would get SIGBUS if it did look.
	if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, (size+page-1)/page*page); err != nil {
		return fmt.Errorf("cannot free the initramfs: %w", err)
	}
	return nil
}

// newMemfd makes an empty file in memory.
func newMemfd(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate("sandboxd-"+name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, fmt.Errorf("cannot make a file in memory: %w", err)
	}
	return os.NewFile(uintptr(fd), name), nil
}
