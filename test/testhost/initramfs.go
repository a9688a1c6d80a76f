package testhost

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// bootModules are what the initramfs must load to reach the disks and the port, in order. They depend on nothing but each
// other and what the kernel has built in.
var bootModules = []string{
	"drivers/virtio/virtio_ring.ko",
	"drivers/virtio/virtio.ko",
	"drivers/virtio/virtio_mmio.ko",
	"drivers/block/virtio_blk.ko",
	"drivers/char/virtio_console.ko",
	"lib/crc16.ko",
	"crypto/crc32c_generic.ko",
	"fs/mbcache.ko",
	"fs/jbd2/jbd2.ko",
	"fs/ext4/ext4.ko",
}

// initramfs is a cpio archive (Documentation/driver-api/early-userspace/buffer-format.rst of the kernel) of init and the
// modules.
func initramfs(init, modules string) ([]byte, error) {
	var b bytes.Buffer
	add := func(path string, mode int, data []byte, major, minor int) {
		fmt.Fprintf(&b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
			b.Len(), mode, 0, 0, 1, 0, len(data), 0, 0, major, minor, len(path)+1, 0)
		b.WriteString(path + "\x00")
		b.Write(make([]byte, -b.Len()&3))
		b.Write(data)
		b.Write(make([]byte, -b.Len()&3))
	}
	for _, dir := range []string{"dev", "proc", "sys", "modules", "root"} {
		add(dir, 0o040755, nil, 0, 0)
	}
	// Go's runtime opens the one, the kernel the other, before anything is mounted.
	add("dev/null", 0o020666, nil, 1, 3)
	add("dev/console", 0o020600, nil, 5, 1)
	var order strings.Builder
	for _, m := range bootModules {
		data, err := os.ReadFile(filepath.Join(modules, "kernel", m))
		if os.IsNotExist(err) {
			continue // built in
		}
		if err != nil {
			return nil, err
		}
		name := "modules/" + filepath.Base(m)
		add(name, 0o100644, data, 0, 0)
		fmt.Fprintf(&order, "/%s\n", name)
	}
	add("modules/order", 0o100644, []byte(order.String()), 0, 0)
	program, err := os.ReadFile(init)
	if err != nil {
		return nil, err
	}
	add("init", 0o100755, program, 0, 0)
	add("TRAILER!!!", 0, nil, 0, 0)
	return b.Bytes(), nil
}
