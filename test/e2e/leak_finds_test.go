package e2e

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// A leak check that finds nothing proves nothing unless it finds what is there: each kind of leak is planted once.
func TestLeakCheckFinds(t *testing.T) {
	for _, c := range []struct {
		kind  string
		plant func(t *testing.T, d *daemon)
	}{
		{"process", plantOrphan},
		{"mount", func(t *testing.T, d *daemon) {
			dir := filepath.Join(d.RunDir, "mounted")
			must(t, os.Mkdir(dir, 0o700))
			must(t, unix.Mount("leak", dir, "tmpfs", 0, ""))
			t.Cleanup(func() {
				must(t, unix.Unmount(dir, 0))
				must(t, os.Remove(dir))
			})
		}},
		{"loop device", plantLoop},
		{"cgroup", func(t *testing.T, d *daemon) {
			dir := filepath.Join(anyHierarchy(t), d.CgroupParent(), "planted")
			must(t, os.MkdirAll(dir, 0o755))
			t.Cleanup(func() { must(t, unix.Rmdir(dir)) })
		}},
		{"network namespace", func(t *testing.T, d *daemon) {
			_, existed := os.Stat("/run/netns")
			must(t, os.MkdirAll("/run/netns", 0o755))
			name := fmt.Sprintf("/run/netns/planted-%d", os.Getpid())
			must(t, os.WriteFile(name, nil, 0o600))
			t.Cleanup(func() {
				must(t, os.Remove(name))
				if existed != nil {
					must(t, os.Remove("/run/netns"))
				}
			})
		}},
		{"network device", plantTap},
		{"file", func(t *testing.T, d *daemon) {
			name := filepath.Join(d.StateDir, "planted")
			must(t, os.WriteFile(name, nil, 0o600))
			t.Cleanup(func() { must(t, os.Remove(name)) })
		}},
		{"file: socket", func(t *testing.T, d *daemon) {
			l, err := net.Listen("unix", filepath.Join(d.RunDir, "planted.sock"))
			must(t, err)
			t.Cleanup(func() { must(t, l.Close()) })
		}},
		{"descriptor of the daemon", func(t *testing.T, d *daemon) {
			// Another process's descriptor that points at the same file is what /proc shows: its log, once more.
			plantDescriptor(t, d)
		}},
	} {
		t.Run(c.kind, func(t *testing.T) {
			before := harness.TakeSnapshot(t, shared)
			t.Run("planted", func(t *testing.T) {
				c.plant(t, shared)
				// Not waiting for it to go: it is there now.
				found, err := before.Leaks(shared, 0)
				must(t, err)
				if !slices.ContainsFunc(found, func(f string) bool { return strings.HasPrefix(f, c.kind) }) {
					t.Errorf("planted a %s, found %q", c.kind, found)
				}
			})
			before.WantNothingNew(t, shared)
		})
	}
}

// After a daemon has gone the same must be found again, so the second check is tested too.
func TestLeakCheckFindsAfterDaemon(t *testing.T) {
	d, err := harness.NewDaemon("leaky")
	must(t, err)
	id := strings.Repeat("0123456789abcdef", 2)
	must(t, os.MkdirAll(filepath.Join(d.StateDir, "sandbox", id), 0o700))
	must(t, os.MkdirAll(filepath.Join(d.StateDir, "images"), 0o700))
	err = d.RemoveWithin(time.Second)
	if err == nil || !strings.Contains(err.Error(), id) || strings.Contains(err.Error(), "images") {
		t.Errorf("planted the directory of a sandbox, and one that may stay; got: %v", err)
	}
}

// plantOrphan leaves a process whose parent is gone, as a daemon that was killed would.
func plantOrphan(t *testing.T, _ *daemon) {
	cmd := exec.Command("sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!")
	out, err := harness.Output(cmd)
	must(t, err)
	var pid int
	_, err = fmt.Sscan(string(out), &pid)
	must(t, err)
	t.Cleanup(func() { must(t, unix.Kill(pid, unix.SIGKILL)) })
}

func plantLoop(t *testing.T, d *daemon) {
	name := filepath.Join(d.StateDir, "planted.img")
	must(t, os.WriteFile(name, make([]byte, 1<<20), 0o600))
	out, err := harness.Output(exec.Command("losetup", "--find", "--show", name))
	must(t, err)
	t.Cleanup(func() {
		_, err := harness.Output(exec.Command("losetup", "--detach", strings.TrimSpace(string(out))))
		must(t, err)
		must(t, os.Remove(name))
	})
}

func anyHierarchy(t *testing.T) string {
	mounts, err := harness.ListMounts(nil)
	must(t, err)
	for _, m := range mounts {
		if strings.HasPrefix(m, "cgroup") {
			return strings.TrimSuffix(strings.Fields(m)[2], ",")
		}
	}
	t.Fatal("no cgroup file system is mounted")
	return ""
}

func plantTap(t *testing.T, _ *daemon) {
	tun, err := os.OpenFile("/dev/net/tun", os.O_RDWR, 0)
	must(t, err)
	t.Cleanup(func() { must(t, tun.Close()) })
	request, err := unix.NewIfreq("planted0")
	must(t, err)
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
	must(t, unix.IoctlIfreq(int(tun.Fd()), unix.TUNSETIFF, request))
}

// plantDescriptor has a stand-in for the daemon open one file more.
func plantDescriptor(t *testing.T, d *daemon) {
	real := d.Cmd
	stand := exec.Command("sleep", "60")
	must(t, harness.StartChild(stand))
	t.Cleanup(func() {
		d.Cmd = real
		must(t, stand.Process.Kill())
		_ = harness.WaitChild(stand)
	})
	// Its three descriptors are /dev/null, which no daemon of ours has.
	d.Cmd = stand
}
