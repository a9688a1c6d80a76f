// Package testhost boots a Debian of its own in QEMU and runs tests there that need what the machine at hand lacks: KVM,
// the kernel's vhost-vsock, cgroup v2, systemd. QEMU emulates the processor, AMD's virtualization included, so it runs
// anywhere, slowly. Everything written there is thrown away.
package testhost

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/test/testhost/wire"
)

const (
	// Making the image takes a minute where the mirror is near; after that it is there.
	imagePatience = 15 * time.Minute
	// From QEMU's start until systemd runs what we send. It takes about ten seconds when the machine is idle.
	bootPatience = 3 * time.Minute
	// How long QEMU may take to end once the port is closed.
	stopPatience = 20 * time.Second

	// Two processors, as many as the machines that build this have.
	processors = 2
	memory     = "3G"
)

// Host is a test host that runs.
type Host struct {
	port *os.File
	enc  *json.Encoder
	dec  *json.Decoder
	log  *logBuffer
	// Asked when the host says nothing more.
	monitor *monitor
	// Closed when QEMU has ended.
	ended chan struct{}
}

// Boot boots a test host in which /data holds files: a name there, a file or directory here. The host ends with the test.
func Boot(t testing.TB, files map[string]string) *Host {
	t.Helper()
	dir := t.TempDir()
	image := makeImage(t)
	data := makeData(t, dir, files)
	initrd := makeInitrd(t, dir)
	kernel := one(t, filepath.Join(repository(t), ".cache/kernel/boot/vmlinuz-*"))

	port, theirPort := socketPair(t)
	monitorPort, theirMonitor := socketPair(t)
	h := &Host{port: port, monitor: newMonitor(monitorPort), log: &logBuffer{}, ended: make(chan struct{})}
	h.enc, h.dec = json.NewEncoder(h.port), json.NewDecoder(h.port)

	cmd := exec.Command("qemu-system-x86_64", arguments(image, data, initrd, kernel)...)
	cmd.ExtraFiles = []*os.File{theirPort, theirMonitor}
	cmd.Stdout, cmd.Stderr = h.log, h.log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	started := make(chan error)
	go func() {
		defer close(h.ended)
		// Pdeathsig counts from the thread that starts it.
		runtime.LockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // however it ends, it has ended
		}
	}()
	if err := <-started; err != nil {
		t.Fatalf("cannot start QEMU: %v; install qemu-system-x86", err)
	}
	_, _ = theirPort.Close(), theirMonitor.Close() // QEMU has them
	t.Cleanup(func() {
		defer monitorPort.Close()
		_ = h.port.Close()
		select {
		case <-h.ended:
		case <-time.After(stopPatience):
			_ = cmd.Process.Kill()
			<-h.ended
		}
	})
	if _, err := h.monitor.call("qmp_capabilities", nil); err != nil {
		t.Fatalf("%v\n%s", err, h.log)
	}
	began := time.Now()
	if e, err := h.next(time.Now().Add(bootPatience)); err != nil || !e.Ready {
		t.Fatalf("the test host did not come up: %v\n%s\n%s", err, h.monitor.state(), h.log)
	}
	t.Logf("test host up after %v", time.Since(began).Round(100*time.Millisecond))
	return h
}

// arguments is QEMU's command line.
func arguments(image, data, initrd, kernel string) []string {
	words := []string{
		"reboot=t panic=-1", // a panic ends QEMU
		// So does a processor that has not scheduled for twice as long, and where it was is said. Addresses are System.map's.
		"softlockup_panic=1 watchdog_thresh=40 nokaslr",
		"mitigations=off audit=0 cryptomgr.notests",
		// Without an invariant counter, which emulation does not claim, Linux trusts no AMD machine of several processors with it,
		// and none is left but the count of its ticks: the clock of a host that waits for its turn then stands still, timers
		// come no oftener than ticks, and guests are given a clock made of both. It is the real processor's counter.
		fmt.Sprintf("tsc=reliable tsc_early_khz=%d", tscKHz()),
		"systemd.show_status=false systemd.unified_cgroup_hierarchy=1",
	}
	args := []string{
		"-no-user-config", "-nodefaults", "-display", "none", "-monitor", "none", "-no-reboot",
		"-machine", "microvm,rtc=on,acpi=on,x-option-roms=off,pit=off,pic=off,isa-serial=on",
		// The features left out are slow at copying under emulation.
		"-cpu", "max,-erms,-fsrm,-smap", "-accel", "tcg,thread=multi,tb-size=512",
		"-smp", fmt.Sprint(processors), "-m", memory,
		"-global", "virtio-mmio.force-legacy=false",
		"-kernel", kernel, "-initrd", initrd,
		// snapshot=on: what is written goes to a file in TMPDIR that has no name any more.
		"-drive", "if=none,id=root,format=raw,snapshot=on,cache=unsafe,file=" + image, "-device", "virtio-blk-device,drive=root,serial=root",
		"-drive", "if=none,id=data,format=raw,snapshot=on,cache=unsafe,file=" + data, "-device", "virtio-blk-device,drive=data,serial=data",
		"-chardev", "socket,id=port,fd=3", "-device", "virtio-serial-device", "-device", "virtserialport,chardev=port,name=" + wire.Port,
		"-chardev", "socket,id=monitor,fd=4", "-mon", "chardev=monitor,mode=control",
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
	}
	if os.Getenv("TESTHOST_CONSOLE") != "" {
		words = append(words, "console=ttyS0 ignore_loglevel")
	} else {
		words = append(words, "console=ttyS0 quiet")
	}
	return append(args, "-append", strings.Join(words, " "))
}

// Run runs a bash script in /data, and answers with what it wrote and its exit code.
func (h *Host) Run(t testing.TB, patience time.Duration, script string) (string, int) {
	t.Helper()
	deadline := time.Now().Add(patience)
	if err := h.enc.Encode(wire.Command{Script: script}); err != nil {
		t.Fatalf("cannot reach the test host: %v\n%s", err, h.log)
	}
	var out bytes.Buffer
	for {
		e, err := h.next(deadline)
		if err != nil {
			t.Fatalf("the test host did not finish in %v: %v\n%s\n%s\n%s", patience, err, out.Bytes(), h.monitor.state(), h.log)
		}
		out.Write(e.Output)
		if e.Error != "" {
			t.Fatalf("the test host cannot run a script: %s", e.Error)
		}
		if e.Done {
			return out.String(), e.ExitCode
		}
	}
}

// Must is Run that fails the test unless the script ends with 0.
func (h *Host) Must(t testing.TB, patience time.Duration, script string) string {
	t.Helper()
	out, code := h.Run(t, patience, script)
	if code != 0 {
		t.Fatalf("exit code %d of\n%s\n%s", code, script, out)
	}
	return out
}

func (h *Host) next(deadline time.Time) (e wire.Event, err error) {
	if err := h.port.SetReadDeadline(deadline); err != nil {
		return e, err
	}
	err = h.dec.Decode(&e)
	if errors.Is(err, io.EOF) {
		err = errors.New("QEMU has ended")
	}
	return e, err
}

// repository is the root of the working tree.
func repository(t testing.TB) string {
	t.Helper()
	out, err := exec.Command("go", "env", "GOMOD").Output()
	if err != nil {
		t.Fatal(err)
	}
	return filepath.Dir(strings.TrimSpace(string(out)))
}

// makeImage is the root disk, made once.
func makeImage(t testing.TB) string {
	t.Helper()
	out := output(t, imagePatience, filepath.Join(repository(t), "test/testhost/image.sh"))
	return strings.TrimSpace(out)
}

// makeData makes the disk that is /data there.
func makeData(t testing.TB, dir string, files map[string]string) string {
	t.Helper()
	tree := filepath.Join(dir, "data")
	for name, from := range files {
		to := filepath.Join(tree, name)
		if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
			t.Fatal(err)
		}
		output(t, time.Minute, "cp", "-a", from, to)
	}
	disk := filepath.Join(dir, "data.ext4")
	output(t, time.Minute, "mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", "-d", tree, disk, "2G")
	return disk
}

// makeInitrd builds the guest program and wraps it up.
func makeInitrd(t testing.TB, dir string) string {
	t.Helper()
	program := Build(t, "./test/testhost/guest")
	b, err := initramfs(program, one(t, filepath.Join(repository(t), ".cache/kernel/lib/modules/*")))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "initrd.cpio")
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// How long a Go build may take on a machine that has built nothing yet.
const buildPatience = 5 * time.Minute

// Build builds a static program.
func Build(t testing.TB, pkg string) string {
	t.Helper()
	return build(t, filepath.Base(pkg), "build", pkg)
}

// BuildTest builds the tests of a package as a static program.
func BuildTest(t testing.TB, pkg string) string {
	t.Helper()
	return build(t, filepath.Base(pkg)+".test", "test", "-c", pkg)
}

func build(t testing.TB, name string, args ...string) string {
	t.Helper()
	out := filepath.Join(t.TempDir(), name)
	args = append([]string{"env", "CGO_ENABLED=0", "go", "-C", repository(t), args[0], "-o", out}, args[1:]...)
	output(t, buildPatience, args[0], args[1:]...)
	return out
}

// output runs a command and answers with what it writes to standard output.
func output(t testing.TB, patience time.Duration, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	stop := time.AfterFunc(patience, func() { _ = cmd.Process.Kill() })
	defer stop.Stop()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s%s", name, args, err, out, stderr.Bytes())
	}
	return string(out)
}

// one is the one file that a pattern matches.
func one(t testing.TB, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(pattern)
	if err != nil || len(found) != 1 {
		t.Fatalf("%s matches %d files (%v), want one; run scripts/setup.sh kernel", pattern, len(found), err)
	}
	return found[0]
}

// logBuffer keeps the end of what QEMU and the kernel say.
type logBuffer struct {
	mu sync.Mutex
	b  []byte // guarded by mu
}

// maxLog bounds a logBuffer.
const maxLog = 64 << 10

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b = append(l.b, p...)
	l.b = l.b[max(0, len(l.b)-maxLog):]
	return len(p), nil
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return string(l.b)
}
