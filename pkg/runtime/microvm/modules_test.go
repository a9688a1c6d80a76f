package microvm

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// fakeModule is the smallest ELF file with a .modinfo section.
func fakeModule(depends string) []byte {
	info := []byte("license=GPL\x00depends=" + depends + "\x00name=whatever\x00")
	names := []byte("\x00.modinfo\x00.shstrtab\x00")
	header := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64, Shentsize: 64, Shnum: 3, Shstrndx: 2}
	copy(header.Ident[:], "\x7fELF\x02\x01\x01")
	infoAt := uint64(64)
	namesAt := infoAt + uint64(len(info))
	header.Shoff = namesAt + uint64(len(names))
	var b bytes.Buffer
	_ = binary.Write(&b, binary.LittleEndian, header)
	b.Write(info)
	b.Write(names)
	for _, s := range []elf.Section64{
		{},
		{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: infoAt, Size: uint64(len(info))},
		{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: namesAt, Size: uint64(len(names))},
	} {
		_ = binary.Write(&b, binary.LittleEndian, s)
	}
	return b.Bytes()
}

// moduleDir makes a lib/modules/<release> directory. Files are by path below it.
func moduleDir(t *testing.T, builtin string, files map[string][]byte) *moduleTree {
	t.Helper()
	dir := t.TempDir()
	var order []string
	for path, data := range files {
		full := filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(full, data, 0o644); err != nil {
			t.Fatal(err)
		}
		stem, _, _ := strings.Cut(path, ".ko")
		order = append(order, stem+".ko") // as distributions leave it, whatever they pack the files with
	}
	for name, text := range map[string]string{"modules.order": strings.Join(order, "\n") + "\n", "modules.builtin": builtin} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	tree, err := openModuleTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func zstdOf(t *testing.T, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(b, nil)
}

// tree is a plausible kernel: ext4 and vsock's common part built in, file names with dashes, packed files.
func fakeTree(t *testing.T, change func(files map[string][]byte)) *moduleTree {
	xz := pack(t, "xz", fakeModule("vsock"))
	files := map[string][]byte{
		"kernel/virtio/virtio.ko":                       fakeModule(""),
		"kernel/virtio/virtio_ring.ko":                  fakeModule("virtio"),
		"kernel/virtio/virtio-mmio.ko.zst":              zstdOf(t, fakeModule("virtio-ring,virtio")),
		"kernel/block/virtio_blk.ko":                    fakeModule("virtio_ring,virtio"),
		"kernel/vsock/vsock.ko":                         fakeModule(""),
		"kernel/vsock/vsock-common.ko.xz":               xz[:len(xz)-4],
		"kernel/vsock/vmw_vsock_virtio_trans.ko":        fakeModule(""),
		"kernel/vsock/vmw_vsock_virtio_transport.ko.gz": pack(t, "gzip", fakeModule("virtio,vsock_common,virtio_ring")),
		"kernel/fs/erofs.ko":                            fakeModule("libcrc32c"),
		"kernel/fs/overlay.ko":                          fakeModule(""),
		"kernel/lib/libcrc32c.ko":                       fakeModule(""),
		"kernel/net/failover.ko":                        fakeModule(""),
		"kernel/net/virtio_net.ko":                      fakeModule("failover,virtio"),
	}
	if change != nil {
		change(files)
	}
	return moduleDir(t, "kernel/fs/ext4/ext4.ko\n", files)
}

func TestModulesComeAfterThoseTheyDependOn(t *testing.T) {
	tree := fakeTree(t, nil)
	modules, err := tree.load()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range modules {
		depends, err := moduleDepends(m.data)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range depends {
			if !slices.Contains(names, d) {
				t.Errorf("%s comes before %s, on which it depends", m.name, d)
			}
		}
		names = append(names, m.name)
	}
	want := []string{"virtio", "virtio_ring", "virtio_mmio", "virtio_blk", "vsock", "vsock_common", "vmw_vsock_virtio_transport", "libcrc32c", "erofs", "overlay", "failover", "virtio_net"}
	if !slices.Equal(names, want) {
		t.Errorf("%v, want %v", names, want)
	}
}

// What a network alone needs is marked, and a kernel without it can do all else.
func TestModulesOfANetwork(t *testing.T) {
	tree := fakeTree(t, nil)
	modules, err := tree.load()
	if err != nil || tree.networkErr != nil {
		t.Fatal(err, tree.networkErr)
	}
	for _, m := range modules {
		if want := m.name == "failover" || m.name == "virtio_net"; m.network != want {
			t.Errorf("%s is for a network: %t", m.name, m.network)
		}
	}
	tree = fakeTree(t, func(f map[string][]byte) { delete(f, "kernel/net/virtio_net.ko") })
	if modules, err = tree.load(); err != nil || len(modules) != 10 {
		t.Errorf("%d modules without those of a network: %v", len(modules), err)
	}
	if tree.networkErr == nil || !strings.Contains(tree.networkErr.Error(), "virtio_net") {
		t.Errorf("why there is no network: %v", tree.networkErr)
	}
}

func TestModulesRefuse(t *testing.T) {
	for name, c := range map[string]struct {
		change func(files map[string][]byte)
		want   string
	}{
		"missing":      {func(f map[string][]byte) { delete(f, "kernel/fs/overlay.ko") }, "neither built in nor"},
		"missing dep":  {func(f map[string][]byte) { delete(f, "kernel/lib/libcrc32c.ko") }, "libcrc32c"},
		"circle":       {func(f map[string][]byte) { f["kernel/virtio/virtio.ko"] = fakeModule("virtio_ring") }, "circular"},
		"not a module": {func(f map[string][]byte) { f["kernel/fs/overlay.ko"] = fakeVmlinux(nil) }, ".modinfo"},
		"not an ELF":   {func(f map[string][]byte) { f["kernel/fs/overlay.ko"] = []byte("text") }, "overlay"},
		"too large":    {func(f map[string][]byte) { f["kernel/fs/overlay.ko"] = make([]byte, maxModule+1) }, "too large"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := fakeTree(t, c.change).load()
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
		})
	}
}

func TestModulesOfADistribution(t *testing.T) {
	kernel := realKernel(t)
	release := strings.TrimPrefix(filepath.Base(kernel), "vmlinuz-")
	dir, err := findModules(kernel, release)
	if err != nil {
		t.Fatal(err)
	}
	tree, err := openModuleTree(dir)
	if err != nil {
		t.Fatal(err)
	}
	modules, err := tree.load()
	if err != nil {
		t.Fatal(err)
	}
	size := 0
	for _, m := range modules {
		size += len(m.data)
		t.Log(m.name, len(m.data))
	}
	if size == 0 {
		t.Error("no modules")
	}
}

func TestFindModulesSaysWhatToDo(t *testing.T) {
	_, err := findModules(filepath.Join(t.TempDir(), "boot/vmlinuz"), "0.0.0-none")
	if err == nil || !strings.Contains(err.Error(), "install the kernel's package") {
		t.Errorf("error %v", err)
	}
}

func TestFindKernel(t *testing.T) {
	boot := t.TempDir()
	_, err := findKernel("", boot)
	if err == nil || !strings.Contains(err.Error(), "install linux-image-cloud-amd64") {
		t.Errorf("empty: %v", err)
	}
	for _, step := range []struct{ add, want string }{
		{"vmlinuz-6.1.0-9-amd64", "vmlinuz-6.1.0-9-amd64"},
		{"vmlinuz-6.1.0-10-amd64", "vmlinuz-6.1.0-10-amd64"},
		{"vmlinuz-5.10.0-30-cloud-amd64", "vmlinuz-5.10.0-30-cloud-amd64"},
		{"vmlinuz-6.1.0-9-cloud-amd64", "vmlinuz-6.1.0-9-cloud-amd64"},
		{"vmlinuz-6.1.0-56-cloud-amd64", "vmlinuz-6.1.0-56-cloud-amd64"},
		{"vmlinuz-6.1.0-07-cloud-amd64", "vmlinuz-6.1.0-56-cloud-amd64"},
		{"vmlinuz-6.12-cloud-amd64", "vmlinuz-6.12-cloud-amd64"},
	} {
		if err := os.WriteFile(filepath.Join(boot, step.add), nil, 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := findKernel("", boot); err != nil || filepath.Base(got) != step.want {
			t.Errorf("with %s: %s (%v), want %s", step.add, got, err, step.want)
		}
	}
	if _, err := findKernel(filepath.Join(boot, "none"), boot); err == nil || !strings.Contains(err.Error(), "--vm-kernel") {
		t.Errorf("missing: %v", err)
	}
}
