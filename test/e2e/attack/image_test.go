package attack

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// built are programs that tests share, each in a directory of its own, by how it was built. Tests here run one after the other.
var built = map[string]string{}

func removeBuilt() error {
	var errs []error
	for _, dir := range built {
		errs = append(errs, os.RemoveAll(dir))
	}
	return errors.Join(errs...)
}

// buildOnce runs go with the arguments, then -o and a directory, then the packages, and answers with the directory.
func buildOnce(t *testing.T, args []string, packages ...string) string {
	t.Helper()
	key := strings.Join(append(args, packages...), " ")
	if dir := built[key]; dir != "" {
		return dir
	}
	dir, err := os.MkdirTemp("", "sandboxd-attack-bin-")
	harness.Must(t, err)
	harness.Must(t, os.Chmod(dir, 0o755))
	built[key] = dir
	args = append(slices.Concat(args, []string{"-buildvcs=false", "-trimpath", "-ldflags", "-s -w", "-o", dir + "/"}), packages...)
	cmd := exec.Command("go", args...)
	cmd.Dir = harness.Root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := harness.Output(cmd); err != nil {
		t.Fatalf("cannot run go %q: %v\n%s", args, err, out)
	}
	return dir
}

// buildPayload makes the program that attacks from inside.
func buildPayload(t *testing.T) string {
	t.Helper()
	return filepath.Join(buildOnce(t, []string{"build"}, "./test/e2e/attack/payload"), "payload")
}

// fileCaps is CAP_CHOWN, permitted and effective, as the kernel stores a file's capabilities (revision 2). A capability outside of
// the bounding set would have execve fail, and show nothing.
var fileCaps = []byte{1, 0, 0, 2, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}

// hostileImage is an image in which whatever can be hostile is.
func hostileImage(t *testing.T, payload string) string {
	t.Helper()
	program, err := os.ReadFile(payload)
	harness.Must(t, err)
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	file := func(name string, mode int64, content []byte, xattrs map[string]string) {
		harness.Must(t, w.WriteHeader(&tar.Header{Name: name, Mode: mode, Size: int64(len(content)), PAXRecords: xattrs}))
		_, err := w.Write(content)
		harness.Must(t, err)
	}
	other := func(h tar.Header) { harness.Must(t, w.WriteHeader(&h)) }
	for _, dir := range []struct {
		name string
		mode int64
	}{{"tmp/", 0o1777}, {"etc/", 0o755}, {"dev/", 0o755}, {"nodes/", 0o755}, {"proc/", 0o755}, {"sys/", 0o755}} {
		other(tar.Header{Typeflag: tar.TypeDir, Name: dir.name, Mode: dir.mode})
	}
	file("attack", 0o755, program, nil)
	file("attack-setuid", 0o4755, program, nil)
	file("attack-caps", 0o755, program, map[string]string{"SCHILY.xattr.security.capability": string(fileCaps)})
	file("etc/passwd", 0o644, []byte("root:x:0:0::/:/attack\napp:x:1000:1000::/:/attack\n"), nil)
	for name, target := range map[string]string{
		"evil-exe": "/proc/self/exe", "evil-cwd": "/proc/self/cwd", "evil-fd": "/proc/self/fd/7", "link-proc": "/proc", "link-root": "/",
		"dev/null": "/proc/sys/kernel/core_pattern", "dev/console": "/proc/sys/kernel/core_pattern", "dev/tty": "/proc/sysrq-trigger",
	} {
		other(tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777})
	}
	for _, n := range []struct {
		name         string
		kind         byte
		major, minor int64
	}{
		{"nodes/loop-control", tar.TypeChar, 10, 237}, {"nodes/loop0", tar.TypeBlock, 7, 0},
		{"nodes/vda", tar.TypeBlock, 254, 0}, {"nodes/memory", tar.TypeChar, 1, 1},
	} {
		other(tar.Header{Typeflag: n.kind, Name: n.name, Mode: 0o666, Devmajor: n.major, Devminor: n.minor})
	}
	harness.Must(t, w.Close())
	path := filepath.Join(t.TempDir(), "hostile.tar")
	harness.Must(t, os.WriteFile(path, b.Bytes(), 0o600))
	return path
}
