package microvm

import (
	"bytes"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// The kernel reads several archives one after the other; so does cpio -i, run once each. GNU's reader stands in for the
// kernel's here, and the VM tests for the rest.
func TestInitramfsUnpacks(t *testing.T) {
	if _, err := exec.LookPath("busybox"); err != nil {
		t.Skip("no busybox: apt-get install busybox-static")
	}
	modules := []module{{name: "a", data: []byte("module a")}, {name: "b", data: bytes.Repeat([]byte("b"), 1001)}}
	agent := bytes.Repeat([]byte("agent"), 333)
	archive := baseInitramfs(agent, modules)
	if len(archive)%cpioAlign != 0 {
		t.Errorf("%d bytes: another archive cannot follow", len(archive))
	}
	second, err := bootInitramfs(spec.VMBoot{Version: 1, Token: "secret"})
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	for _, a := range [][]byte{archive, second} {
		cmd := exec.Command("busybox", "cpio", "-i", "-d")
		cmd.Dir, cmd.Stdin = dir, bytes.NewReader(a)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("cpio: %v: %s", err, out)
		}
	}
	for path, want := range map[string]string{"init": string(agent), "modules/a.ko": "module a", "modules/b.ko": strings.Repeat("b", 1001)} {
		if got, err := os.ReadFile(filepath.Join(dir, path)); err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v", path, len(got), err)
		}
	}
	for path, want := range map[string]uint32{
		"init": unix.S_IFREG | 0o555, "boot.json": unix.S_IFREG | 0o400, "modules/a.ko": unix.S_IFREG | 0o400,
		"dev/console": unix.S_IFCHR | 0o600, "dev/null": unix.S_IFCHR | 0o666, "proc": unix.S_IFDIR | 0o555,
	} {
		var st unix.Stat_t
		if err := unix.Lstat(filepath.Join(dir, path), &st); err != nil || st.Mode != want {
			t.Errorf("%s: mode %o, want %o (%v)", path, st.Mode, want, err)
		}
		if path == "dev/console" && st.Rdev != unix.Mkdev(5, 1) || path == "dev/null" && st.Rdev != unix.Mkdev(1, 3) {
			t.Errorf("%s: device %#x", path, st.Rdev)
		}
	}
	var boot spec.VMBoot
	b, err := os.ReadFile(filepath.Join(dir, "boot.json"))
	if err != nil || json.Unmarshal(b, &boot) != nil || boot.Token != "secret" {
		t.Errorf("boot.json: %s, %v", b, err)
	}
}

func TestForgetInitramfsLeavesOnlyZeros(t *testing.T) {
	base := filepath.Join(t.TempDir(), "base")
	if err := os.WriteFile(base, bytes.Repeat([]byte("x"), 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	g := &guest{initramfsPath: base}
	f, err := g.initramfs(g.vmBoot(bootToken{1, 2, 3}, transportRecord{Name: transportVhostUser, Port: 1023}, false), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1<<20+4096)
	n, _ := f.ReadAt(b, 0)
	if !bytes.Contains(b[:n], []byte("01020300")) {
		t.Fatal("the token is not in the initramfs")
	}
	if err := forgetInitramfs(f); err != nil {
		t.Fatal(err)
	}
	m, _ := f.ReadAt(b, 0)
	if m != n || len(bytes.Trim(b[:m], "\x00")) != 0 {
		t.Errorf("%d of %d bytes are left, not all zero", m, n)
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil || st.Blocks != 0 {
		t.Errorf("%d blocks are still in memory (%v)", st.Blocks, err)
	}
}
