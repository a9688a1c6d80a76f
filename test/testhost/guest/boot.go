package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// How long the kernel may take to show a disk whose driver is loaded.
const diskPatience = 10 * time.Second

const (
	self    = "/usr/local/sbin/testhost"
	unit    = "/etc/systemd/system/testhost.service"
	unitOf  = "/etc/systemd/system/multi-user.target.wants/testhost.service"
	newRoot = "/root"
)

// The service that runs what the test sends. It starts when the system is up, so that systemctl is-system-running can
// tell the truth soon.
const service = `[Unit]
Description=Runs what the test sends
After=dbus.service systemd-udevd.service
[Service]
ExecStart=` + self + ` serve
StandardOutput=journal
Delegate=yes
`

// boot is the initramfs: modules, disks, systemd.
func boot() error {
	for _, m := range []struct{ kind, at string }{{"devtmpfs", "/dev"}, {"proc", "/proc"}, {"sysfs", "/sys"}} {
		if err := unix.Mount(m.kind, m.at, m.kind, 0, ""); err != nil {
			return fmt.Errorf("cannot mount %s: %w", m.kind, err)
		}
	}
	order, err := os.ReadFile("/modules/order")
	if err != nil {
		return err
	}
	for _, path := range strings.Fields(string(order)) {
		if err := load(path); err != nil {
			return fmt.Errorf("cannot load %s: %w", path, err)
		}
	}
	for _, d := range []struct{ serial, at string }{{"root", newRoot}, {"data", newRoot + "/data"}} {
		if err := mountDisk(d.serial, d.at); err != nil {
			return err
		}
	}
	// The disk is thrown away with the machine, so the image needs to know nothing of us.
	program, err := os.ReadFile("/init")
	if err != nil {
		return err
	}
	if err := os.WriteFile(newRoot+self, program, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(newRoot+unit, []byte(service), 0o644); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(newRoot+unitOf), 0o755); err != nil {
		return err
	}
	if err := os.Symlink(unit, newRoot+unitOf); err != nil {
		return err
	}
	return switchRoot()
}

func load(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && err != unix.EEXIST {
		return err
	}
	return nil
}

// mountDisk mounts the disk that has a serial number.
func mountDisk(serial, at string) error {
	if err := os.MkdirAll(at, 0o755); err != nil {
		return err
	}
	for end := time.Now().Add(diskPatience); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		found, _ := filepath.Glob("/sys/block/vd*/serial")
		for _, file := range found {
			if b, err := os.ReadFile(file); err != nil || strings.TrimSpace(string(b)) != serial {
				continue
			}
			dev := "/dev/" + filepath.Base(filepath.Dir(file))
			if err := unix.Mount(dev, at, "ext4", 0, ""); err != nil {
				return fmt.Errorf("cannot mount %s: %w", dev, err)
			}
			return nil
		}
	}
	return fmt.Errorf("no disk %q in %v", serial, diskPatience)
}

// switchRoot makes the disk the root, as initramfs must do it, and becomes systemd.
func switchRoot() error {
	for _, m := range []string{"/dev", "/proc", "/sys"} {
		if err := unix.Mount(m, newRoot+m, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("cannot move %s: %w", m, err)
		}
	}
	if err := unix.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("cannot move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	return unix.Exec("/sbin/init", []string{"/sbin/init"}, []string{"PATH=/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin"})
}

func powerOff() {
	unix.Sync()
	_ = unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART) // with reboot=t and -no-reboot this ends QEMU
}
