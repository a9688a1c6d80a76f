package runtimetest

import (
	"context"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// toolTimeout bounds a tool that makes a small file, or compiles a program.
const toolTimeout = 5 * time.Minute

// applets are the commands of busybox that tests call by name.
var applets = []string{
	"sh", "cat", "cp", "dd", "df", "echo", "env", "false", "grep", "head", "hostname", "id", "ip", "kill", "ln", "ls", "mkdir", "mount", "mv", "ping",
	"ps", "pwd", "rm", "rmdir", "seq", "sha256sum", "sleep", "sort", "stat", "stty", "sync", "tail", "tar", "test", "touch", "tr", "true",
	"umount", "uname", "unshare", "wc", "which", "yes",
}

// BusyboxImage makes an EROFS image of a small system: busybox, a passwd and a group file, and /etc/motd that says
// "welcome". It lies on the file system of the test's temporary directory.
func BusyboxImage(t testing.TB) string {
	t.Helper()
	root := t.TempDir()
	for _, dir := range []string{"bin", "etc", "root", "tmp", "proc", "sys", "dev"} {
		if err := os.Mkdir(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(root, "tmp"), 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	copyBusybox(t, filepath.Join(root, "bin", "busybox"))
	for _, applet := range applets {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range map[string]string{
		"passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
		"group":  "root:x:0:\nnogroup:x:65534:\n",
		"motd":   "welcome\n",
	} {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(t.TempDir(), "busybox.erofs")
	run(t, nil, "mkfs.erofs", "--quiet", "--all-root", image, root)
	return image
}

// copyBusybox copies the host's static busybox.
func copyBusybox(t testing.TB, to string) {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatalf("%v: run `make test-assets`, or install busybox-static", err)
	}
	from, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer from.Close()
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(f, from); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
}

// BuildProgram compiles one of this module's programs, static as the real one, and answers with its path.
func BuildProgram(t testing.TB, name string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), name)
	run(t, []string{"CGO_ENABLED=0"}, "go", "build", "-o", out, "github.com/sandboxd/sandboxd/cmd/"+name)
	return out
}

func run(t testing.TB, env []string, name string, args ...string) {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Fatalf("%v: run `make test-assets`, or install it", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), toolTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), env...)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, out)
	}
}
