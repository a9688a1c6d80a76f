package testhost

import (
	"strings"
	"testing"
	"time"
)

const (
	// A few commands. Emulation is slow, and the machine may be busy.
	commandPatience = 2 * time.Minute
	// A group of tests that boot guests of their own.
	testsPatience = 4 * time.Minute
)

// TestHost boots the host once, for boots are what takes long, and shows what the machine at hand can't.
func TestHost(t *testing.T) {
	h := Boot(t, map[string]string{
		"src/pkg/runtime/microvm/microvm.test": BuildTest(t, "./pkg/runtime/microvm"),
		"bin/sandbox-agent":                    Build(t, "./cmd/sandbox-agent"),
		"bin/sandbox-vsock":                    Build(t, "./cmd/sandbox-vsock"),
		"bin/rogue":                            Build(t, "./pkg/runtime/microvm/testdata/rogue"),
		"bin/vsockguest":                       Build(t, "./pkg/runtime/microvm/testdata/vsockguest"),
	})
	t.Run("is what the others need", func(t *testing.T) {
		out := h.Must(t, commandPatience, `
			systemctl is-system-running --wait
			stat -f -c %T /sys/fs/cgroup
			modprobe -a kvm_amd vhost_vsock
			udevadm settle
			stat -c %F:%n /dev/kvm /dev/vhost-vsock`)
		want := "running\ncgroup2fs\ncharacter special file:/dev/kvm\ncharacter special file:/dev/vhost-vsock\n"
		if out != want {
			t.Errorf("the host says\n%s\nwant\n%s", out, want)
		}
	})
	t.Run("microVMs under KVM with the kernel's vsock", func(t *testing.T) {
		h.tests(t, "src/pkg/runtime/microvm", "microvm.test", "SANDBOXD_TEST_ACCEL=kvm SANDBOXD_TEST_PROGRAMS=/data/bin",
			"TestKernelTransport", "TestLifeOfAVM", "TestAVMOutlivesItsDaemon", "TestManyAtOnce")
	})
}

// tests runs tests of a test program, each of which must pass: one that skips has shown nothing.
func (h *Host) tests(t *testing.T, dir, program, environment string, names ...string) {
	t.Helper()
	out, code := h.Run(t, testsPatience, "cd "+dir+" && "+environment+" ./"+program+" -test.v -test.run '^("+strings.Join(names, "|")+")$'")
	t.Log("\n" + out)
	if code != 0 {
		t.Fatalf("exit code %d", code)
	}
	for _, name := range names {
		if !strings.Contains(out, "\n--- PASS: "+name+" ") {
			t.Errorf("%s did not pass", name)
		}
	}
	if strings.Contains(out, "--- SKIP") {
		t.Error("something skipped")
	}
}
