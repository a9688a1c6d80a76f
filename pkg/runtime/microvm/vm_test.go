package microvm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

func TestLifeOfAVM(t *testing.T) {
	b := newBench(t)
	r := b.runtime(t)
	v := b.start(t, r)
	ctx := testContext(t)

	if got := v.sh(t, "uname -r"); !strings.HasSuffix(b.config.Kernel, got) {
		t.Errorf("the guest runs %s, not %s", got, b.config.Kernel)
	}
	if got := v.sh(t, "echo $((6*7)); cat /kept 2>/dev/null || echo none; echo written > /kept"); got != "42\nnone" {
		t.Errorf("the script printed %q", got)
	}
	if f := v.Facts(); f.Accelerator != b.config.Accel || f.AgentTransport == "" || f.HostPID == 0 {
		t.Errorf("facts %+v", f)
	}
	u, err := v.Usage()
	if err != nil || u.CPUTime == 0 || u.MemoryBytes == 0 || u.DiskBytes == 0 || u.DiskLimitBytes != v.Resources.DiskBytes || u.MemoryLimitBytes <= guestMemory {
		t.Errorf("usage %+v, %v", u, err)
	}
	if _, err := r.Start(ctx, v.Sandbox); spec.KindOf(err) != spec.KindAlreadyExists {
		t.Errorf("a second start of the same id: %v", err)
	}
	if got := v.sh(t, "echo still there"); got != "still there" {
		t.Errorf("after a refused second start: %q", got)
	}
	if ids, err := r.List(ctx); err != nil || !slices.Equal(ids, []string{v.ID}) {
		t.Errorf("list %v, %v", ids, err)
	}

	if err := v.client.Shutdown(ctx, 0); err != nil {
		t.Errorf("shutdown: %v", err)
	}
	awaitDone(t, v)
	if _, err := v.Dial(ctx); !errors.Is(err, runtime.ErrNotRunning) {
		t.Errorf("dial after the end: %v", err)
	}
	if err := v.Kill(); err != nil {
		t.Errorf("kill after the end: %v", err)
	}
	if _, err := r.Attach(ctx, v.ID); !errors.Is(err, runtime.ErrNotRunning) {
		t.Errorf("attach after the end: %v", err)
	}
	if err := r.Release(ctx, v.ID); err != nil {
		t.Fatal(err)
	}

	again := b.startSandbox(t, r, v.Sandbox)
	if got := again.sh(t, "cat /kept"); got != "written" {
		t.Errorf("after a new start the file holds %q", got)
	}
	for range 2 { // idempotent
		b.remove(t, r, v.ID)
	}
	if ids, err := r.List(ctx); err != nil || len(ids) != 0 {
		t.Errorf("list after remove %v, %v", ids, err)
	}
}

func TestAKilledVMsLayerIsRepaired(t *testing.T) {
	b := newBench(t)
	r := b.runtime(t)
	v := b.start(t, r)
	v.sh(t, "for i in 1 2 3 4 5 6 7 8; do echo $i > /file$i; done; sync")
	if err := v.Kill(); err != nil {
		t.Fatal(err)
	}
	awaitDone(t, v)
	ctx := testContext(t)
	if err := r.Release(ctx, v.ID); err != nil {
		t.Fatal(err)
	}
	layer := filepath.Join(b.dir, "state/sandbox", v.ID, "disk.ext4")
	if isClean(t, layer) {
		t.Fatal("the layer of a killed VM is clean: this test shows nothing")
	}
	again := b.startSandbox(t, r, v.Sandbox)
	if got := again.sh(t, "cat /file8; busybox dmesg 2>/dev/null | busybox grep -c 'unchecked fs' || true"); !strings.HasPrefix(got, "8") {
		t.Errorf("after the repair: %q", got)
	}
	if info, err := os.Stat(layer); err != nil || info.Sys() == nil || !ownedByRoot(layer) {
		t.Errorf("the layer does not belong to root (%v)", err)
	}
}

func isClean(t *testing.T, layer string) bool {
	t.Helper()
	f, err := os.Open(layer)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var state [2]byte
	if _, err := f.ReadAt(state[:], ext4StateOffset); err != nil {
		t.Fatal(err)
	}
	return state[0]&ext4StateMask == ext4StateClean
}

func ownedByRoot(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && st.Uid == 0
}

// TestARuinedLayerIsRefused: what e2fsck can't mend is an error, not a VM with lost files.
func TestARuinedLayerIsRefused(t *testing.T) {
	b := newBench(t)
	r := b.runtime(t)
	s := b.sandbox()
	layer, _, err := b.config.Disk.Layer(b.config.StateDir, s.ID, layerOwner, s.Resources.DiskBytes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.remove(t, r, s.ID) })
	f, err := os.OpenFile(layer, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(make([]byte, 4096), 0); err != nil {
		t.Fatal(err)
	}
	_, err = r.Start(testContext(t), s)
	if err == nil || !strings.Contains(err.Error(), "cannot repair the writable layer") {
		t.Errorf("start: %v", err)
	}
	if _, err := os.Stat(layer); err != nil || !ownedByRoot(layer) {
		t.Errorf("the layer is gone or not root's: a failed start must leave it (%v)", err)
	}
}

func TestManyAtOnce(t *testing.T) {
	b := newBench(t)
	r := b.runtime(t)
	const many = 6
	var wait sync.WaitGroup
	ctx := testContext(t)
	for n := range many {
		wait.Go(func() {
			s := b.sandbox()
			i, err := r.Start(ctx, s)
			if err != nil {
				t.Error(err)
				return
			}
			conn, err := i.Dial(ctx)
			if err != nil {
				t.Error(err)
			} else {
				_ = conn.Close()
			}
			if n%2 == 0 {
				if err := i.Kill(); err != nil {
					t.Error(err)
				}
			}
			if err := r.Remove(ctx, s.ID); err != nil {
				t.Error(err)
			}
			select {
			case <-i.Done():
			default:
				t.Error("removed, and not done")
			}
		})
	}
	wait.Wait()
}

// TestWhatIsWrittenIsBelievedOnlyOnce: a start that fails leaves nothing, whatever it had made.
func TestFailedStartsLeaveNothing(t *testing.T) {
	script := func(text string) func(*testing.T, *bench) {
		return func(t *testing.T, b *bench) {
			b.config.QEMU = filepath.Join(b.dir, "qemu")
			if err := os.WriteFile(b.config.QEMU, []byte("#!/bin/sh\n"+text), 0o755); err != nil {
				t.Fatal(err)
			}
			for dir := b.dir; dir != "/"; dir = filepath.Dir(dir) { // it runs as a user of its own
				if err := os.Chmod(dir, 0o755|os.ModeSticky); err != nil && dir != "/tmp" {
					t.Fatal(err)
				}
				if dir == os.TempDir() || filepath.Dir(dir) == "/tmp" {
					break
				}
			}
		}
	}
	for name, c := range map[string]struct {
		change  func(t *testing.T, b *bench)
		sandbox func(s *spec.Sandbox)
		timeout time.Duration
		want    string
	}{
		"no image":       {sandbox: func(s *spec.Sandbox) { s.ImagePath += ".missing" }, want: "cannot open the image"},
		"image is a dir": {sandbox: func(s *spec.Sandbox) { s.ImagePath = "/etc" }, want: "not a regular file"},
		"bad id":         {sandbox: func(s *spec.Sandbox) { s.ID = "../../etc" }, want: "not the id"},
		"tiny disk":      {sandbox: func(s *spec.Sandbox) { s.Resources.DiskBytes = 1 }, want: "writable layer"},
		"little memory":  {sandbox: func(s *spec.Sandbox) { s.Resources.MemoryBytes = 24 << 20 }, want: "memory"},
		"no QEMU":        {change: func(_ *testing.T, b *bench) { b.config.QEMU = "/nonexistent/qemu" }, want: "install qemu-system-x86"},
		"no helper":      {change: func(_ *testing.T, b *bench) { b.config.VsockHelper = "/nonexistent/vsock" }, want: "/nonexistent/vsock"},
		"QEMU complains": {change: script("echo cannot do that >&2; exit 1\n"), want: "cannot do that"},
		"QEMU floods":    {change: script("while echo 0123456789abcdef >&2; do :; done; exit 1\n"), want: "0123456789abcdef"},
		"QEMU is silent": {change: script("while :; do :; done\n"), timeout: 3 * time.Second, want: "did not answer in time"},
		"guest gives up": {change: func(_ *testing.T, b *bench) { b.config.Agent = "/bin/true" }, want: "the guest's kernel panicked: No working init"},
		"no kernel":      {change: func(_ *testing.T, b *bench) { b.config.Kernel = "/nonexistent/vmlinuz" }, want: "--vm-kernel"},
		"not a kernel":   {change: func(_ *testing.T, b *bench) { b.config.Kernel = "/bin/true" }, want: "cannot use the guest kernel"},
		"no agent":       {change: func(_ *testing.T, b *bench) { b.config.Agent = "/nonexistent/agent" }, want: "cannot read the agent"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			if c.change != nil {
				c.change(t, b)
			}
			r := b.runtime(t)
			s := b.sandbox()
			if c.sandbox != nil {
				c.sandbox(&s)
			}
			ctx := testContext(t)
			if c.timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, c.timeout)
				defer cancel()
			}
			_, err := r.Start(ctx, s)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want one with %q", err, c.want)
			}
			if err != nil && len(err.Error()) > 1200 {
				t.Errorf("an error of %d bytes", len(err.Error()))
			}
			t.Log(err)
		})
	}
}

// TestConfinement looks at both processes from the host.
func TestConfinement(t *testing.T) {
	b := newBench(t)
	defer unix.Umask(unix.Umask(0o077)) // the daemon's
	r := b.runtime(t)
	v := b.start(t, r)
	base, err := b.config.IDs.Lookup(v.ID)
	if err != nil {
		t.Fatal(err)
	}
	group, err := cgroup.Load(b.config.CgroupParent, v.ID)
	if err != nil {
		t.Fatal(err)
	}
	pids, err := group.Pids()
	if err != nil {
		t.Fatal(err)
	}
	rec, err := loadRecord(r.dir(v.ID))
	if err != nil {
		t.Fatal(err)
	}
	var want []int
	for _, p := range rec.processes() {
		want = append(want, p.process.PID)
	}
	slices.Sort(want)
	if !slices.Equal(pids, want) {
		t.Errorf("processes of the cgroup %v, of the record %v", pids, want)
	}
	for _, pid := range pids {
		proc := fmt.Sprintf("/proc/%d/", pid)
		status, err := os.ReadFile(proc + "status")
		if err != nil {
			t.Fatal(err)
		}
		id := fmt.Sprintf("%d\t%d\t%d\t%d", base, base, base, base)
		for _, line := range []string{"Uid:\t" + id, "Gid:\t" + id, "Groups:\t \n", "CapInh:\t0000000000000000", "CapPrm:\t0000000000000000", "CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "CapAmb:\t0000000000000000", "NoNewPrivs:\t1", "Seccomp:\t2"} {
			if !bytes.Contains(status, []byte(line)) {
				t.Errorf("process %d has no %q in its status:\n%s", pid, line, status)
			}
		}
		for _, ns := range []string{"net", "ipc", "pid", "uts", "mnt"} {
			theirs, err1 := os.Readlink(proc + "ns/" + ns)
			ours, err2 := os.Readlink("/proc/self/ns/" + ns)
			if err1 != nil || err2 != nil || theirs == ours {
				t.Errorf("process %d shares the host's %s namespace (%v, %v)", pid, ns, err1, err2)
			}
		}
		b.checkRoot(t, proc+"root", pid == rec.QEMU.PID)
		if environ, err := os.ReadFile(proc + "environ"); err != nil || len(environ) != 0 {
			t.Errorf("process %d has the environment %q (%v)", pid, environ, err)
		}
	}
	b.checkDescriptors(t, r, v, rec.QEMU.PID)
}

// checkRoot looks at a jail from outside: what is at its top, and that nothing of it can be written.
func (b *bench) checkRoot(t *testing.T, root string, qemu bool) {
	t.Helper()
	want := []string{"sandbox-vsock"}
	if qemu {
		want = []string{"etc", "initrd", "kernel", "lib", "lib64", "usr"}
		if testAccel() == AccelKVM {
			want = append(want, "dev")
		}
	}
	entries, err := os.ReadDir(root + "/")
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if !slices.Equal(sorted(got), sorted(want)) {
		t.Errorf("%s holds %v, want %v", root, got, want)
	}
	mounts, err := os.ReadFile(filepath.Dir(root) + "/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		fields := strings.Fields(line)
		options := strings.Split(fields[5], ",")
		if device := strings.HasPrefix(fields[4], "/dev/"); !device && (!slices.Contains(options, "ro") || !slices.Contains(options, "nodev")) || !slices.Contains(options, "nosuid") {
			t.Errorf("a mount that allows too much: %s", line)
		}
	}
}

// checkDescriptors compares QEMU's descriptors with those it needs.
func (b *bench) checkDescriptors(t *testing.T, r *Runtime, v *vm, pid int) {
	t.Helper()
	var files []string
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		target, err := os.Readlink(fd)
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(target, "/") && !slices.Contains(files, target) {
			files = append(files, target)
		}
		if target == v.ImagePath {
			info, err := os.ReadFile(strings.Replace(fd, "/fd/", "/fdinfo/", 1))
			// Octal; the last digit's lower two bits are the access mode.
			flags := regexp.MustCompile(`flags:\t[0-7]*([0-7])\n`).FindSubmatch(info)
			if err != nil || flags == nil || flags[1][0]&unix.O_ACCMODE != unix.O_RDONLY {
				t.Errorf("QEMU has the image open otherwise than O_RDONLY: %s (%v)", info, err)
			}
		}
	}
	want := sorted([]string{"/dev/null", "/memfd:memory-backend-memfd (deleted)",
		v.ImagePath, filepath.Join(b.dir, "state/sandbox", v.ID, "disk.ext4")})
	if got := sorted(files); !slices.Equal(got, want) {
		t.Errorf("QEMU's files:\n%s\nwant:\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// TestOneProcessWithoutTheOtherIsNoSandbox kills each of them alone.
func TestOneProcessWithoutTheOtherIsNoSandbox(t *testing.T) {
	b := newBench(t)
	r := b.runtime(t)
	for n := range 2 {
		v := b.start(t, r)
		rec, err := loadRecord(r.dir(v.ID))
		if err != nil {
			t.Fatal(err)
		}
		processes := rec.processes()
		if n >= len(processes) {
			t.Log("this host's transport has no helper process")
			continue
		}
		if err := unix.Kill(processes[n].process.PID, unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		awaitDone(t, v)
		b.remove(t, r, v.ID)
	}
}

func TestQMPOfARunningVM(t *testing.T) {
	b := newBench(t)
	r := b.runtime(t)
	v := b.start(t, r)
	i := v.Instance.(*instance)
	ctx := testContext(t)
	if s, err := i.state(ctx); err != nil || s != "running" {
		t.Errorf("state %q, %v", s, err)
	}
	conn, err := dialUnix(ctx, i.dir, qmpSocket)
	if err != nil {
		t.Fatal(err)
	}
	q, err := newQMP(ctx, conn)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	if err := q.quit(ctx); err != nil {
		t.Error(err)
	}
	awaitDone(t, v)
}
