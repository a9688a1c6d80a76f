package microvm

import (
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// wantedModules are what the guest's agent needs, each with the modules it depends on; whatever the kernel has built in
// is left out.
var wantedModules = []struct {
	name string
	// Left out where the kernel has it neither built in nor as a module.
	optional bool
	// Loaded only in a guest that is joined to a network.
	network bool
	// Loaded only where the agent speaks over a port.
	port   bool
	reason string
}{
	{name: "virtio_mmio", reason: "the bus of every device that QEMU's microvm machine has"},
	{name: "virtio_blk", reason: "the image and the writable layer"},
	{name: "vmw_vsock_virtio_transport", reason: "the agent's way to the daemon"},
	{name: "erofs", reason: "the image's file system"},
	{name: "crc32c_generic", optional: true, reason: "ext4 and erofs ask the crypto layer for crc32c by name, which no module's dependencies say"},
	{name: "ext4", reason: "the writable layer's file system"},
	{name: "overlay", reason: "the writable layer over the image"},
	{name: "virtio_net", network: true, reason: "the network card"},
	{name: "virtio_console", optional: true, port: true, reason: "the agent's way to the daemon in a template and its clones, where the host has no vsock"},
}

const (
	// maxModule bounds one unpacked module. The largest of those wanted, ext4, has about 1 MiB.
	maxModule = 16 << 20
	// maxModuleIndex bounds modules.order and modules.builtin: distributions' have about 300 KiB.
	maxModuleIndex = 8 << 20
)

// moduleEndings are how a module's file may end: what modules.order says, then the compressed forms a distribution may
// have made of it since.
var moduleEndings = []string{".ko", ".ko.zst", ".ko.xz", ".ko.gz"}

// module is one to load, unpacked.
type module struct {
	name string
	data []byte
	// Only a network needs it.
	network bool
	// Only a port needs it.
	port bool
}

// findModules finds the directory lib/modules/<release> that belongs to the kernel at vmlinuz: beside its own boot
// directory, as a package unpacked anywhere has it, or the host's.
func findModules(vmlinuz, release string) (string, error) {
	var looked []string
	for _, dir := range []string{filepath.Join(filepath.Dir(vmlinuz), "..", "lib", "modules"), "/lib/modules", "/usr/lib/modules"} {
		dir = filepath.Join(dir, release)
		if _, err := os.Stat(filepath.Join(dir, "modules.order")); err == nil {
			return dir, nil
		}
		looked = append(looked, dir)
	}
	return "", spec.Errorf(spec.KindUnsupported, "no modules for the guest kernel %s (looked for modules.order in %s): install the kernel's package, or unpack it whole so that lib/modules lies beside boot",
		release, strings.Join(looked, ", "))
}

// moduleTree is a lib/modules/<release> directory. It needs no modules.dep, which only exists where depmod has run:
// each module says itself which it depends on.
type moduleTree struct {
	dir string
	// By name with underscores: path below dir.
	paths   map[string]string
	builtin map[string]bool
	// Why load found no modules for a network: such a kernel can do all else.
	networkErr error
}

func openModuleTree(dir string) (*moduleTree, error) {
	t := &moduleTree{dir: dir, paths: map[string]string{}, builtin: map[string]bool{}}
	if err := eachModule(filepath.Join(dir, "modules.order"), func(name, path string) { t.paths[name] = path }); err != nil {
		return nil, err
	}
	// A kernel without it has nothing built in that could be a module.
	if err := eachModule(filepath.Join(dir, "modules.builtin"), func(name, _ string) { t.builtin[name] = true }); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	return t, nil
}

// eachModule reads a list of modules, a path each line.
func eachModule(file string, fn func(name, path string)) error {
	f, err := os.Open(file)
	if err != nil {
		return fmt.Errorf("cannot read the kernel's list of modules: %w", err)
	}
	defer f.Close()
	b, err := readBounded(f, maxModuleIndex)
	if err != nil {
		return fmt.Errorf("cannot read %s: %w", file, err)
	}
	lines := bufio.NewScanner(bytes.NewReader(b))
	for lines.Scan() {
		p := strings.TrimSpace(lines.Text())
		if p != "" && filepath.IsLocal(p) {
			fn(moduleName(p), p)
		}
	}
	return lines.Err()
}

// moduleName is what the kernel calls the module in a file.
func moduleName(file string) string {
	name, _, _ := strings.Cut(path.Base(file), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// load reads the wanted modules and all they depend on, in an order in which they can be loaded.
func (t *moduleTree) load() ([]module, error) {
	var l moduleLoad
	for _, want := range wantedModules {
		if want.optional && t.paths[want.name] == "" {
			continue
		}
		l.network, l.port = want.network, want.port
		err := l.add(t, want.name, nil)
		if err != nil && want.network {
			t.networkErr = fmt.Errorf("the guest kernel's module %s (%s): %w", want.name, want.reason, err)
			continue
		}
		if err != nil {
			return nil, spec.Errorf(spec.KindUnsupported, "the guest kernel's module %s (%s): %w", want.name, want.reason, err)
		}
	}
	return l.modules, nil
}

type moduleLoad struct {
	modules       []module
	done          map[string]bool
	network, port bool // of the module that is wanted
}

// add appends a module after those it depends on. parents are the modules being added, outermost first.
func (l *moduleLoad) add(t *moduleTree, name string, parents []string) error {
	if t.builtin[name] || l.done[name] {
		return nil
	}
	if slices.Contains(parents, name) {
		return fmt.Errorf("circular dependency: %s", strings.Join(append(parents, name), " → "))
	}
	data, err := t.read(name)
	if err != nil {
		return err
	}
	depends, err := moduleDepends(data)
	if err != nil {
		return fmt.Errorf("cannot read module %s: %w", name, err)
	}
	for _, d := range depends {
		if err := l.add(t, d, append(slices.Clone(parents), name)); err != nil {
			return err
		}
	}
	if l.done == nil {
		l.done = map[string]bool{}
	}
	l.done[name] = true
	l.modules = append(l.modules, module{name: name, data: data, network: l.network, port: l.port})
	return nil
}

// read reads and unpacks a module.
func (t *moduleTree) read(name string) ([]byte, error) {
	p, ok := t.paths[name]
	if !ok {
		return nil, fmt.Errorf("%s is neither built in nor in %s", name, filepath.Join(t.dir, "modules.order"))
	}
	stem, _, _ := strings.Cut(filepath.Join(t.dir, p), ".ko")
	for _, ending := range moduleEndings {
		f, err := os.Open(stem + ending)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		defer f.Close()
		b, err := readBounded(f, maxModule)
		if err == nil && ending != ".ko" {
			b, err = decompressFile(b, maxModule)
		}
		if err != nil {
			return nil, fmt.Errorf("cannot read %s: %w", f.Name(), err)
		}
		return b, nil
	}
	return nil, fmt.Errorf("no file %s.ko, packed or not", stem)
}

// moduleDepends reads which modules one depends on, from its own .modinfo: NUL-terminated name=value strings.
func moduleDepends(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("not a kernel module: no .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var depends []string
	for field := range bytes.SplitSeq(info, []byte{0}) {
		value, ok := bytes.CutPrefix(field, []byte("depends="))
		if !ok {
			continue
		}
		for name := range strings.SplitSeq(string(value), ",") {
			if name != "" {
				depends = append(depends, strings.ReplaceAll(name, "-", "_"))
			}
		}
	}
	return depends, nil
}
