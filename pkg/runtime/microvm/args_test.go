package microvm

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// argsCases are the command lines that differ in kind.
var argsCases = map[string]vmArgs{
	"tcg-vhost-user": {
		ID: "0123456789abcdef0123456789abcdef", Accelerator: accelTCG, CPUs: 1, MemoryBytes: 256 << 20, TSCKHz: 2596100,
		Firmware: "/usr/share/qemu/qboot.rom", Vsock: 3, QMP: 4, Kernel: kernelPath, Initrd: initrdPath, Image: 5, Disk: 6,
		Transport: transportVhostUser, CID: 3,
	},
	"kvm-kernel-vsock": {
		ID: "0123456789abcdef0123456789abcdef", Accelerator: accelKVM, CPUs: 4, MemoryBytes: 1 << 30,
		Firmware: "/usr/share/qemu/qboot.rom", Vsock: 3, QMP: 4, Kernel: kernelPath, Initrd: initrdPath, Image: 5, Disk: 6,
		Transport: transportKernel, CID: 4711,
	},
	"network": {
		ID: "0123456789abcdef0123456789abcdef", Accelerator: accelTCG, CPUs: 1, MemoryBytes: 256 << 20, TSCKHz: 2596100,
		Firmware: "/usr/share/qemu/qboot.rom", Vsock: 3, QMP: 4, Kernel: kernelPath, Initrd: initrdPath, Image: 7, Disk: 8, Tap: 9,
		Transport: transportVhostUser, CID: 3,
	},
	"template": {
		ID: "0123456789abcdef0123456789abcdef", Accelerator: accelTCG, CPUs: 1, MemoryBytes: 256 << 20, TSCKHz: 2596100,
		Firmware: "/usr/share/qemu/qboot.rom", Vsock: 3, QMP: 4, Kernel: kernelPath, Initrd: initrdPath, Image: 5, BlankDisk: true,
		Transport: transportPort, Memory: 6, MemoryShared: true,
	},
	"clone": {
		ID: "0123456789abcdef0123456789abcdef", Accelerator: accelTCG, CPUs: 1, MemoryBytes: 256 << 20, TSCKHz: 2596100,
		Firmware: "/usr/share/qemu/qboot.rom", Vsock: 3, QMP: 4, Image: 5, Disk: 6,
		Transport: transportPort, Memory: 7, Incoming: true,
	},
	"kvm-trial": {
		ID: "0123456789abcdef0123456789abcdef", Accelerator: accelKVM, CPUs: 1, MemoryBytes: 128 << 20,
		Vsock: 3, QMP: 4, Kernel: kernelPath, Initrd: initrdPath, Transport: transportVhostUser, CID: 3, Verbose: true,
	},
}

func TestArgsGolden(t *testing.T) {
	for name, a := range argsCases {
		t.Run(name, func(t *testing.T) {
			var b strings.Builder
			for _, row := range a.table() {
				b.WriteString(strings.TrimRight(row.option+" "+row.value, " ") + "\n")
			}
			path := filepath.Join("testdata", name+".args")
			if *update {
				if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if b.String() != string(want) {
				t.Errorf("the command line changed; if that is meant, run go test -update and look at the difference\ngot:\n%swant:\n%s", b.String(), want)
			}
		})
	}
}

// What protects the host must be on every command line.
func TestArgsAlwaysProtect(t *testing.T) {
	for name, a := range argsCases {
		line := strings.Join(a.argv(), " ")
		for _, want := range []string{
			"-no-user-config", "-nodefaults", "-no-reboot",
			"-sandbox on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
		} {
			if !strings.Contains(line, want) {
				t.Errorf("%s: no %s", name, want)
			}
		}
		if a.Image == 0 {
			continue
		}
		for _, want := range []string{"filename=/dev/fdset/1,read-only=on,auto-read-only=off", "node-name=image,file=image-file,read-only=on"} {
			if !strings.Contains(line, want) {
				t.Errorf("%s: the image is writable: no %s", name, want)
			}
		}
	}
}
