package microvm

import (
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/console"
)

// TestJail takes the place of a VM's QEMU, in its jail, before QEMU's own filter is set, and tries to reach another VM, the
// daemon, the host and the network.
func TestJail(t *testing.T) {
	b := newBench(t)
	r := b.runtime(t)
	other := b.start(t, r)
	rec, err := loadRecord(r.dir(other.ID))
	if err != nil {
		t.Fatal(err)
	}
	host, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer host.Close()

	victims := map[string]any{
		"Files": []string{
			b.config.StateDir, b.config.RunDir, filepath.Join(b.dir, "state/sandbox", other.ID, "disk.ext4"), other.ImagePath, r.dir(other.ID),
			filepath.Join(r.dir(other.ID), recordFile), "/etc/passwd", "/etc/shadow", "/proc", "/proc/1/environ", "/sys", "/sys/fs/cgroup", "/run",
			"/dev/mem", "/dev/kmsg", "/dev/kvm", "/dev/vhost-vsock", "/dev/net/tun", "/dev/loop-control", "/dev/null",
		},
		"Sockets": []string{filepath.Join(r.dir(other.ID), qmpSocket), filepath.Join(r.dir(other.ID), vsockSocket)},
		"PIDs":    []int{os.Getpid(), rec.QEMU.PID, rec.Helper.PID},
		"Port":    host.Addr().(*net.TCPAddr).Port,
	}
	if rec.Helper.PID == 0 {
		victims["PIDs"] = []int{os.Getpid(), rec.QEMU.PID}
	}
	named, err := json.Marshal(victims)
	if err != nil {
		t.Fatal(err)
	}
	program, err := os.ReadFile(filepath.Join(b.programs, "jailbreak"))
	if err != nil {
		t.Fatal(err)
	}
	b.config.QEMU = filepath.Join(b.dir, "taken-over")
	if err := os.WriteFile(b.config.QEMU, append(append(program, 0), named...), 0o755); err != nil {
		t.Fatal(err)
	}
	b.config.Accel = AccelTCG // it is no QEMU: KVM could not be seen to work with it
	taken, err := New(b.config)
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	s := b.sandbox()
	s.ConsolePath = filepath.Join(t.TempDir(), "console.log")
	if _, err := taken.Start(testContext(t), s); err == nil || !strings.Contains(err.Error(), "QEMU exited with code 1") {
		t.Errorf("the start: %v", err)
	}
	attempts := 0
	if err := console.Read(s.ConsolePath, func(e console.Entry) error {
		if what, ok := strings.CutPrefix(e.Text, qemuPrefix); ok {
			attempts++
			if !strings.Contains(what, ": refused: ") {
				t.Errorf("from within the jail: %s", what)
			} else {
				t.Log(what)
			}
		}
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if attempts < 20 {
		t.Errorf("only %d attempts were made", attempts)
	}
	// The other has noticed nothing.
	if got := other.sh(t, "echo alive"); got != "alive" {
		t.Error(got)
	}
}
