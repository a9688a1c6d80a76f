package container

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

func TestSandboxStandsAndLeavesNothing(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	s := h.sandbox(1)
	i := mustStart(t, r, s)

	if while := traces(t, h); strings.Split(while, "cgroups")[0] == strings.Split(h.before, "cgroups")[0] {
		t.Error("no loop device was seen: the leak check is blind")
	}
	if while := traces(t, h); strings.Contains(while, " - ") {
		t.Errorf("the host's mount table shows something of the sandbox: %s", while)
	}
	base, err := h.config.IDs.Lookup(s.ID)
	if err != nil {
		t.Fatal(err)
	}
	pid := i.Facts().HostPID
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil || !strings.Contains(string(status), fmt.Sprintf("Uid:\t%d\t%d\t%d\t%d\n", base, base, base, base)) ||
		!strings.Contains(string(status), "Groups:\t \n") {
		t.Errorf("ids on the host: %s, %v, want only %d and no groups", status, err, base)
	}
	for _, ns := range []string{"user", "pid", "mnt", "net", "ipc", "uts", "cgroup"} {
		ours, err := os.Readlink("/proc/self/ns/" + ns)
		theirs, err2 := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, ns))
		if err := errors.Join(err, err2); err != nil || ours == theirs {
			t.Errorf("%s namespace: %s, host's %s, %v", ns, theirs, ours, err)
		}
	}
	want(t, i, "id -u; id -g; stat -c '%u:%g %a' /home/user /tmp / | tr '\\n' ' '", "0\n0\n1000:1000 755 0:0 1777 0:0 711")
	want(t, i, "cat /etc/motd; echo changed >/etc/motd; cat /etc/motd", "from the image\nchanged")
	want(t, i, "echo x >/home/user/f && chown 1000:65535 /home/user/f && chmod 4750 /home/user/f && stat -c '%u:%g %a' /home/user/f", "1000:65535 4750")
	want(t, i, "mkdir /d && mv /d /e && rm -r /etc && test ! -e /etc && ls -d /e", "/e")
	want(t, i, "ls /proc/1/fd 2>&1 | grep -c denied", "1")
	want(t, i, "cut -d: -f3 /proc/self/cgroup | sort -u", "/") // in the cgroup namespace its own group is the root
	want(t, i, "ip link | grep -c '^[0-9]'", "1")
	if out, code := sh(t, i, "mknod /null c 1 3"); code == 0 {
		t.Errorf("a device node was made: %s", out)
	}
	// The image brings nodes that the host's root may use; where they are mounted with device nodes allowed, they must not work.
	want(t, i, "mount -o remount,bind,dev / && stat -c '%t:%T %a' /dev/loop-control && echo ok", "a:ed 666\nok")
	if out, code := sh(t, i, ": </dev/loop-control"); code == 0 || !strings.Contains(out, "not permitted") {
		t.Errorf("the image's device node works: %s", out)
	}
	want(t, i, ": </dev/null && echo ok", "ok")
	if out, _ := sh(t, i, "cat /proc/mounts /proc/self/mountinfo | grep overlay"); strings.Contains(out, filepath.Dir(h.config.RunDir)) || !strings.Contains(out, "lowerdir") {
		t.Errorf("the mount table inside tells of the host: %s", out)
	}

	u, err := i.Usage()
	if err != nil || u.CPUTime <= 0 || u.MemoryBytes == 0 || u.MemoryLimitBytes != 64<<20 || u.Pids == 0 || u.PidsLimit != 64 ||
		u.DiskBytes == 0 || u.DiskLimitBytes != 64<<20 || u.DiskBytes >= u.DiskLimitBytes {
		t.Errorf("usage %+v, %v", u, err)
	}
	if ids, err := r.List(t.Context()); err != nil || !slices.Equal(ids, []string{s.ID}) {
		t.Errorf("List = %v, %v", ids, err)
	}
	if _, err := r.Start(t.Context(), s); spec.KindOf(err) != spec.KindAlreadyExists {
		t.Errorf("a second Start = %v, want KindAlreadyExists", err)
	}
	want(t, i, "echo still here", "still here")
	for range 2 {
		if err := i.Kill(); err != nil {
			t.Errorf("Kill: %v", err)
		}
	}
	waitDone(t, i)
	if err := i.Kill(); err != nil {
		t.Errorf("Kill after the end: %v", err)
	}
	if _, err := i.Dial(t.Context()); !errors.Is(err, runtime.ErrNotRunning) {
		t.Errorf("Dial after the end = %v, want ErrNotRunning", err)
	}
	if _, err := r.Attach(t.Context(), s.ID); !errors.Is(err, runtime.ErrNotRunning) {
		t.Errorf("Attach after the end = %v, want ErrNotRunning", err)
	}
	for range 2 {
		mustRemove(t, r, s.ID)
	}
	if ids, err := r.List(t.Context()); err != nil || len(ids) > 0 {
		t.Errorf("List = %v, %v", ids, err)
	}
}

func TestReleaseKeepsTheLayerWithUnshiftedIDs(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	s := h.sandbox(1)
	i := mustStart(t, r, s)
	want(t, i, "echo kept >/home/user/f; chown 1000:2000 /home/user/f; rm /etc/motd; echo done", "done")
	if err := r.Release(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	waitDone(t, i)
	if ids, err := r.List(t.Context()); err != nil || !slices.Equal(ids, []string{s.ID}) {
		t.Errorf("List after Release = %v, %v", ids, err)
	}
	layer := disk.LayerPath(h.config.StateDir, s.ID)
	out, err := exec.CommandContext(t.Context(), "/usr/sbin/debugfs", "-R", "stat /upper/home/user/f", layer).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "User:  1000   Group:  2000") {
		t.Errorf("on disk: %s, %v, want 1000 and 2000", out, err)
	}
	if out, err := exec.CommandContext(t.Context(), "/usr/sbin/e2fsck", "-fn", layer).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v: %s", err, out)
	}
	// Another range of ids must make no difference.
	if _, err := h.config.IDs.Allocate("somebody"); err != nil {
		t.Fatal(err)
	}
	i = mustStart(t, r, s)
	want(t, i, "cat /home/user/f; stat -c %u:%g /home/user/f; ls /etc", "kept\n1000:2000")
	mustRemove(t, r, s.ID)
	if err := h.config.IDs.Release("somebody"); err != nil {
		t.Fatal(err)
	}
}

// The root directory has the image's attributes until the sandbox changes them, whenever a daemon died.
func TestRootHasTheImagesAttributes(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	s := h.sandbox(1)
	// As a daemon leaves it that died after it made the layer.
	if _, _, err := h.config.Disk.Layer(r.config.StateDir, s.ID, name, s.Resources.DiskBytes); err != nil {
		t.Fatal(err)
	}
	want(t, mustStart(t, r, s), "stat -c '%u:%g %a' /; chmod 1750 /; chown 5:6 /", "0:0 711")
	if err := r.Release(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	want(t, mustStart(t, r, s), "stat -c '%u:%g %a' /", "5:6 1750")
	mustRemove(t, r, s.ID)
}

func TestLimitsBite(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	limited := func(t *testing.T, n int, l spec.Resources) runtime.Instance {
		t.Helper()
		s := h.sandbox(n)
		s.Resources = l
		i := mustStart(t, r, s)
		t.Cleanup(func() { mustRemove(t, r, s.ID) })
		return i
	}
	t.Run("memory", func(t *testing.T) {
		i := limited(t, 1, spec.Resources{CPUMillis: 2000, MemoryBytes: 32 << 20, Pids: 16, DiskBytes: 16 << 20})
		if out, code := sh(t, i, `awk 'BEGIN { s = "x"; while (length(s) < 100000000) s = s s }'`); code == 0 {
			t.Errorf("100 MB fitted into 32 MiB: %s", out)
		}
		// cgroup v2 lets the kernel charge a page or two beyond the limit before it acts.
		if u, err := i.Usage(); err != nil || u.MemoryPeakBytes > 33<<20 || u.MemoryPeakBytes < 16<<20 {
			t.Errorf("peak %d, %v", u.MemoryPeakBytes, err)
		}
		want(t, i, "echo alive", "alive")
	})
	t.Run("pids", func(t *testing.T) {
		i := limited(t, 2, spec.Resources{CPUMillis: 2000, MemoryBytes: 64 << 20, Pids: 8, DiskBytes: 16 << 20})
		if out, code := sh(t, i, "for i in $(seq 200); do sleep 300 & done"); code == 0 || !strings.Contains(out, "fork") {
			t.Errorf("200 processes fitted into a limit of 8: %q, %d", out, code)
		}
	})
	t.Run("disk", func(t *testing.T) {
		i := limited(t, 3, spec.Resources{CPUMillis: 2000, MemoryBytes: 64 << 20, Pids: 16, DiskBytes: 16 << 20})
		if out, code := sh(t, i, "cp /bin/busybox /big; while cat /big; do :; done 2>&1 >/bigger"); !strings.Contains(out, "No space left") {
			t.Errorf("the disk never was full: %q, %d", out, code)
		}
		if u, err := i.Usage(); err != nil || u.DiskBytes > 17<<20 {
			t.Errorf("the layer occupies %d bytes, %v, with a limit of 16 MiB", u.DiskBytes, err)
		}
		want(t, i, "rm /big /bigger; echo fits >/small && cat /small", "fits")
	})
	t.Run("processor", func(t *testing.T) {
		i := limited(t, 4, spec.Resources{CPUMillis: 200, MemoryBytes: 64 << 20, Pids: 16, DiskBytes: 16 << 20})
		before, err := i.Usage()
		if err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		sh(t, i, "timeout -s KILL 1 sh -c 'while :; do :; done'")
		u, err := i.Usage()
		took := time.Since(begin)
		if share := float64(u.CPUTime-before.CPUTime) / float64(took); err != nil || took < time.Second || share > 0.4 {
			t.Errorf("used %.2f of a processor in %v, %v, with a limit of 0.2", share, took, err)
		}
	})
}

func TestTenAtOnce(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	var wg sync.WaitGroup
	for n := range 10 {
		wg.Go(func() {
			s := h.sandbox(n)
			i, err := r.Start(t.Context(), s)
			if err != nil {
				t.Errorf("Start: %v", err)
				return
			}
			c, err := i.Dial(t.Context())
			if err != nil {
				t.Errorf("Dial: %v", err)
			} else {
				_ = c.Close()
			}
			if n%2 == 0 {
				if err := i.Kill(); err != nil {
					t.Errorf("Kill: %v", err)
				}
			}
			mustRemove(t, r, s.ID)
			waitDone(t, i)
		})
	}
	wg.Wait()
}

func TestNextDaemonFindsSandboxes(t *testing.T) {
	h := newHost(t)
	first := h.daemon(t)
	s, gone := h.sandbox(1), h.sandbox(2)
	i := mustStart(t, first, s)
	want(t, i, "echo before >/f; echo ok", "ok")
	other := mustStart(t, first, gone)
	if err := first.Close(); err != nil { // all that a daemon holds of its sandboxes
		t.Fatal(err)
	}
	select {
	case <-i.Done():
		t.Error("the sandbox ended with its daemon")
	default:
	}
	h.config.CgroupParent += "-elsewhere" // the record knows better
	second := h.daemon(t)
	h.config.CgroupParent = strings.TrimSuffix(h.config.CgroupParent, "-elsewhere")
	i, err := second.Attach(t.Context(), s.ID)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := second.Attach(t.Context(), s.ID); err != nil || again != i {
		t.Errorf("a second Attach = %v, %v, want the same instance", again, err)
	}
	want(t, i, "cat /f; df / | grep -c overlay; echo more >>/f; sync; cat /f", "before\n0\nbefore\nmore")
	if u, err := i.Usage(); err != nil || u.PidsLimit != 64 || u.DiskBytes == 0 {
		t.Errorf("usage %+v, %v", u, err)
	}
	if err := other.Kill(); err != nil {
		t.Fatal(err)
	}
	o, err := second.Attach(t.Context(), gone.ID)
	if err == nil { // it may take a moment to die
		waitDone(t, o)
	} else if !errors.Is(err, runtime.ErrNotRunning) {
		t.Errorf("Attach to a dead sandbox = %v, want ErrNotRunning", err)
	}
	if ids, err := second.List(t.Context()); err != nil || !slices.Equal(ids, []string{s.ID, gone.ID}) {
		t.Errorf("List = %v, %v", ids, err)
	}
	if err := i.Kill(); err != nil {
		t.Fatal(err)
	}
	waitDone(t, i)
	for _, id := range []string{s.ID, gone.ID} {
		mustRemove(t, second, id)
	}
	reap(t)
}

// Of an unknown sandbox nothing is there, and removing it is no error; of an id that is none everything is refused.
// An image on a file system that has no block device behind it (or any image on a kernel before 6.12) needs a loop device.
func TestImageBehindALoopDevice(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	dir, err := os.MkdirTemp("/dev/shm", "sandboxd-test-")
	if err != nil {
		t.Skipf("needs a tmpfs on /dev/shm: %v", err)
	}
	defer os.RemoveAll(dir) //nolint:errcheck // a test's
	b, err := os.ReadFile(h.image)
	if err != nil {
		t.Fatal(err)
	}
	s := h.sandbox(1)
	s.ImagePath = filepath.Join(dir, "image.erofs")
	if err := os.WriteFile(s.ImagePath, b, 0o444); err != nil {
		t.Fatal(err)
	}
	i := mustStart(t, r, s)
	want(t, i, "cat /etc/motd", "from the image")
	if !strings.Contains(traces(t, h), s.ImagePath) {
		t.Error("the image is behind no loop device: this test tests nothing")
	}
	mustRemove(t, r, s.ID)
}

func TestLongRunDirectory(t *testing.T) {
	h := newHost(t)
	for range 5 {
		h.config.RunDir = filepath.Join(h.config.RunDir, strings.Repeat("long", 10))
	}
	r := h.daemon(t)
	s := h.sandbox(1)
	i := mustStart(t, r, s)
	want(t, i, "echo reached", "reached")
	mustRemove(t, r, s.ID)
}

// A descriptor that the daemon was started with must not reach the agent, nor any of its own.
func TestAgentGetsNoOtherDescriptors(t *testing.T) {
	h := newHost(t)
	secret, err := unix.Open(t.TempDir(), unix.O_RDONLY|unix.O_DIRECTORY, 0) // not CLOEXEC
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(secret) //nolint:errcheck // a test's
	r := h.daemon(t)
	s := h.sandbox(1)
	i := mustStart(t, r, s)
	want(t, i, "echo ok", "ok")
	dir := fmt.Sprintf("/proc/%d/fd", i.Facts().HostPID)
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) == 0 {
		t.Fatalf("%v, %v", entries, err)
	}
	for _, e := range entries {
		target, err := os.Readlink(filepath.Join(dir, e.Name()))
		if err != nil {
			continue // of a connection that ended meanwhile
		}
		switch {
		case target == "/dev/null", target == "/memfd:agent-stderr (deleted)", target == "/mnt", // the root's mount
			strings.HasPrefix(target, "socket:"), strings.HasPrefix(target, "anon_inode:"): // its listener; Go's poller
		default:
			t.Errorf("descriptor %s is %s", e.Name(), target)
		}
	}
	mustRemove(t, r, s.ID)
}

func TestImageMountIsSharedAndGivenBack(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	a, b := mustStart(t, r, h.sandbox(1)), mustStart(t, r, h.sandbox(2))
	mounted := func() (n int) {
		if err := r.mounts.do(func() error { n = len(r.mounts.images); return nil }); err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := mounted(); n != 1 {
		t.Errorf("two sandboxes of one image have %d mounts of it", n)
	}
	mustRemove(t, r, h.sandbox(1).ID)
	waitDone(t, a)
	want(t, b, "cat /etc/motd", "from the image")
	mustRemove(t, r, h.sandbox(2).ID)
	r.watches.Wait() // a moment after the removal
	if n := mounted(); n != 1 {
		t.Errorf("%d images are mounted right after the last sandbox", n)
	}
	for deadline := time.Now().Add(10 * imageLinger); mounted() != 0; {
		if time.Now().After(deadline) {
			t.Fatal("the image stays mounted")
		}
		time.Sleep(imageLinger / 10)
	}
}

// An agent that was taken over can write to its standard error for ever; the host keeps a bounded part.
func TestStandardErrorIsBounded(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	s := h.sandbox(1)
	i := mustStart(t, r, s)
	inst, ok := i.(*instance)
	if !ok {
		t.Fatal("not an instance")
	}
	if err := inst.held.crash.Truncate(1 << 30); err == nil {
		t.Error("the file can grow")
	}
	if _, err := inst.held.crash.WriteAt([]byte("x"), crashLogSize); err == nil {
		t.Error("the file can be written past its end")
	}
	mustRemove(t, r, s.ID)
}

func TestProbe(t *testing.T) {
	h := newHost(t)
	a := h.daemon(t).Probe(t.Context())
	if !a.Available || a.Reason == "" || len(a.Checks) != len(steps) {
		t.Errorf("Probe = %+v", a)
	}
	for _, c := range a.Checks {
		if c.Result != resultOK || c.Finding == "" || c.Advice != "" {
			t.Errorf("check %+v", c)
		}
	}
	t.Log(a.Reason)
	saved := h.config
	h.config.Agent = "/nonexistent"
	a = h.daemon(t).Probe(t.Context())
	h.config = saved
	last := a.Checks[len(a.Checks)-1]
	if a.Available || last.Name != "container: fork" || last.Result != resultFailed || last.Advice == "" {
		t.Errorf("Probe without an agent = %+v", a)
	}
}

func TestDialIsBoundedByItsContext(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	s := h.sandbox(1)
	i := mustStart(t, r, s)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := i.Dial(ctx); err == nil {
		t.Error("Dial ignored its context")
	}
	var conns []net.Conn
	for range 50 {
		c, err := i.Dial(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	for _, c := range conns {
		_ = c.Close()
	}
	mustRemove(t, r, s.ID)
}

func BenchmarkStartRemove(b *testing.B) {
	h := newHost(b)
	r := h.daemon(b)
	mustStart(b, r, h.sandbox(1)) // the first makes template, thread and memory file
	mustRemove(b, r, h.sandbox(1).ID)
	var starting, removing time.Duration
	for b.Loop() {
		begin := time.Now()
		mustStart(b, r, h.sandbox(1))
		started := time.Now()
		mustRemove(b, r, h.sandbox(1).ID)
		starting += started.Sub(begin)
		removing += time.Since(started)
	}
	b.ReportMetric(float64(starting.Microseconds())/float64(b.N)/1000, "ms/start")
	b.ReportMetric(float64(removing.Microseconds())/float64(b.N)/1000, "ms/remove")
}
