package microvm

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// trialVariable marks a test program in a mount namespace of its own.
const trialVariable = "SANDBOXD_TEST_MICROVM_TRIAL"

// TestKVMIsTriedOut boots a guest under KVM, or sees that none comes up. It runs in a mount namespace of its own, in
// which everyone may open /dev/kvm: many hosts have it closed to all but root, and then no guest is tried at all.
func TestKVMIsTriedOut(t *testing.T) {
	if _, err := os.Stat(kvmDevice); err != nil {
		t.Skipf("no KVM: run the tests on a host with %s", kvmDevice)
	}
	if os.Getenv(trialVariable) == "" {
		cmd := exec.CommandContext(testContext(t), os.Args[0], "-test.run=^TestKVMIsTriedOut$", "-test.v")
		cmd.Env = append(os.Environ(), trialVariable+"=1")
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS}
		out, err := cmd.CombinedOutput()
		if err != nil || strings.Contains(string(out), "SKIP") {
			t.Errorf("in a mount namespace: %v\n%s", err, out)
		}
		t.Logf("%s", out)
		return
	}
	b := newBench(t)
	openKVMToAll(t, b.dir)
	b.config.Accel = AccelKVM
	r := b.runtime(t)
	ctx := testContext(t)

	began := time.Now()
	a := r.Probe(ctx)
	if took := time.Since(began); took > kvmTrial+undoTimeout {
		t.Errorf("the trial took %v", took)
	}
	t.Logf("after %v: %+v", time.Since(began), a)
	v, err := r.kvm(ctx)
	if err != nil || !v.Tried {
		t.Fatalf("no guest was tried: %+v, %v", v, err)
	}
	b.checkNothingRuns(t)
	if a.Available != v.Works {
		t.Errorf("available %v, though KVM works: %v", a.Available, v.Works)
	}

	// A restarted daemon believes what was seen.
	began = time.Now()
	again := b.runtime(t)
	if cached, err := again.kvm(ctx); err != nil || cached != v {
		t.Errorf("another daemon's verdict %+v, %v; the first one's %+v", cached, err, v)
	}
	if took := time.Since(began); took > kvmTrial/2 {
		t.Errorf("the verdict was not kept: it took %v", took)
	}
	s := b.sandbox()
	i, err := again.Start(ctx, s)
	defer b.remove(t, again, s.ID)
	switch {
	case v.Works && (err != nil || i.Facts().Accelerator != accelKVM):
		t.Errorf("KVM works, and a start gives %v", err)
	case !v.Works && (spec.ReasonOf(err) != spec.ReasonUnsatisfiable || !strings.Contains(err.Error(), "--vm-accel auto") || !strings.Contains(err.Error(), "did not come up")):
		t.Errorf("KVM does not work, and a start gives %v", err)
	}
	b.config.Accel = AccelAuto
	if a := b.runtime(t).Probe(ctx); !a.Available || (a.Accelerator == accelKVM) != v.Works {
		t.Errorf("auto: %+v", a)
	}
}

// openKVMToAll puts a node of the same device over /dev/kvm, in this mount namespace alone.
func openKVMToAll(t *testing.T, dir string) {
	t.Helper()
	var st unix.Stat_t
	node := filepath.Join(dir, "kvm")
	err := errors.Join(
		unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""),
		unix.Stat(kvmDevice, &st),
		unix.Mknod(node, unix.S_IFCHR|0o666, int(st.Rdev)),
		unix.Chmod(node, 0o666),
		unix.Mount(node, kvmDevice, "", unix.MS_BIND, ""),
	)
	if err != nil {
		t.Fatal(err)
	}
}

// TestPolicyWithoutKVM: without KVM a VM is refused with what to do, unless emulation was allowed.
func TestPolicyWithoutKVM(t *testing.T) {
	if v := lookAtKVM(); v.Works {
		t.Skip("KVM may work here, and TestKVMIsTriedOut shows the rest: run this one where /dev/kvm is missing or closed")
	}
	b := newBench(t)
	ctx := testContext(t)
	b.config.Accel = AccelKVM
	r := b.runtime(t)
	began := time.Now()
	_, err := r.Start(ctx, b.sandbox())
	if spec.KindOf(err) != spec.KindUnsupported || spec.ReasonOf(err) != spec.ReasonUnsatisfiable || !strings.Contains(err.Error(), "--vm-accel auto") {
		t.Errorf("start: %v", err)
	}
	if took := time.Since(began); took > kvmTrial/2 {
		t.Errorf("to see that took %v", took)
	}
	if a := r.Probe(ctx); a.Available || a.Accelerator != "" || !strings.Contains(a.Reason, kvmDevice) {
		t.Errorf("kvm: %+v", a)
	}
	b.config.Accel = AccelAuto
	if a := b.runtime(t).Probe(ctx); !a.Available || a.Accelerator != accelTCG || !strings.Contains(a.AcceleratorReason, kvmDevice) {
		t.Errorf("auto: %+v", a)
	}
}

func TestProbeNamesWhatIsMissing(t *testing.T) {
	for name, c := range map[string]struct {
		change func(c *Config)
		want   string
	}{
		"qemu":   {func(c *Config) { c.QEMU = "/nonexistent/qemu" }, "install qemu-system-x86"},
		"kernel": {func(c *Config) { c.Kernel = "/nonexistent/vmlinuz" }, "--vm-kernel"},
		"agent":  {func(c *Config) { c.Agent = "/nonexistent/agent" }, "install sandbox-agent"},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			c.change(&b.config)
			a := b.runtime(t).Probe(testContext(t))
			if a.Available || !strings.Contains(a.Reason, c.want) {
				t.Errorf("%+v", a)
			}
		})
	}
	b := newBench(t)
	a := b.runtime(t).Probe(testContext(t))
	if !a.Available || a.Accelerator != accelTCG || a.VMMVersion == "" || a.GuestKernel != b.config.Kernel || a.AgentTransport == "" {
		t.Errorf("with everything: %+v", a)
	}
	for _, c := range a.Checks {
		if c.Result == checkFailed || c.Finding == "" {
			t.Errorf("check %+v", c)
		}
	}
}

func TestNewRefusesAnUnknownAccelerator(t *testing.T) {
	b := newBench(t)
	b.config.Accel = ""
	if _, err := New(b.config); spec.KindOf(err) != spec.KindInvalid {
		t.Errorf("error %v", err)
	}
}

// A directory that somebody put a link in the place of must not be used.
func TestNewRefusesALink(t *testing.T) {
	b := newBench(t)
	if err := os.MkdirAll(b.config.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/tmp", filepath.Join(b.config.RunDir, "microvm")); err != nil {
		t.Fatal(err)
	}
	if _, err := New(b.config); err == nil || !strings.Contains(err.Error(), "must be a directory") {
		t.Errorf("error %v", err)
	}
	if err := os.Remove(filepath.Join(b.config.RunDir, "microvm")); err != nil {
		t.Fatal(err)
	}
}

func TestVerdictIsForOneHostAndKernel(t *testing.T) {
	path := filepath.Join(t.TempDir(), verdictFile)
	if err := os.WriteFile(path, []byte(`{"works":true,"reason":"seen","key":"a","tried":true}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if v, ok := loadVerdict(path, "a"); !ok || !v.Works {
		t.Errorf("%+v, %v", v, ok)
	}
	if _, ok := loadVerdict(path, "b"); ok {
		t.Error("a verdict for another host is believed")
	}
	for _, damaged := range []string{"", "{", `{"works":1}`, "[]"} {
		if err := os.WriteFile(path, []byte(damaged), 0o600); err != nil {
			t.Fatal(err)
		}
		if v, ok := loadVerdict(path, ""); ok && v.Works {
			t.Errorf("%q is believed", damaged)
		}
	}
}
