package microvm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	mathrand "math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
)

// Both transports with a guest at the other end: QEMU under TCG for the helper's, under KVM for the kernel's, where the
// host has it.

const (
	// How long a guest may take to boot and dial on a busy machine.
	bootPatience = 90 * time.Second
	// How long anything else may take there.
	transportPatience = 60 * time.Second
)

// testProgram builds a program of this repository, or finds it in the directory that the environment names, on hosts
// where there is no Go.
func testProgram(t *testing.T, pkg string) string {
	t.Helper()
	if dir := os.Getenv(programsVariable); dir != "" {
		return filepath.Join(dir, filepath.Base(pkg))
	}
	out := filepath.Join(t.TempDir(), filepath.Base(pkg))
	build := exec.Command("go", "build", "-o", out, pkg)
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if b, err := build.CombinedOutput(); err != nil {
		t.Fatalf("cannot build %s: %v\n%s", pkg, err, b)
	}
	return out
}

// transportGuest is a guest that runs, and the daemon's way to it.
type transportGuest struct {
	t transport
	// The processes, and their output.
	qemu, helper *exec.Cmd
	log          *logBuffer
	token        bootToken
	dir          string
}

// logBuffer takes what several processes say.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// bootTransport boots a guest whose vsock is ends.QEMU.
func bootTransport(t *testing.T, tr transport, ends transportFiles, token bootToken, accel string) *transportGuest {
	t.Helper()
	g := &transportGuest{t: tr, log: &logBuffer{}, token: token}
	t.Cleanup(func() { _ = tr.Close() })
	if len(ends.Helper) > 0 {
		rec := tr.Record()
		g.helper = exec.Command(testProgram(t, "../../../cmd/sandbox-vsock"),
			"--cid", strconv.FormatUint(uint64(rec.CID), 10), "--port", strconv.FormatUint(uint64(rec.Port), 10))
		g.helper.ExtraFiles = ends.Helper
		g.helper.Stderr = g.log
		startProcess(t, g.helper)
	}

	kernel, err := prepareGuest(t.TempDir(), realKernel(t), testProgram(t, "./testdata/vsockguest"))
	if err != nil {
		t.Fatal(err)
	}
	initrd, err := kernel.initramfs(kernel.vmBoot(token, tr.Record(), false), uint32(os.Getuid()))
	if err != nil {
		t.Fatal(err)
	}
	vmlinux, err := os.Open(kernel.vmlinuxPath)
	if err != nil {
		t.Fatal(err)
	}
	qmp, err := listenUnix(t.TempDir(), qmpSocket)
	if err != nil {
		t.Fatal(err)
	}
	qemu, err := exec.LookPath(qemuName)
	if err != nil {
		t.Skipf("no QEMU (%v): install qemu-system-x86", err)
	}
	sample := sampleTSC()
	args := vmArgs{
		ID: t.Name(), Accelerator: accel, CPUs: 1, MemoryBytes: 192 << 20, TSCKHz: sample.kHz(), Firmware: firmware(qemu),
		Kernel: fdPath(3), Initrd: fdPath(4), QMP: 5, Vsock: 6, Transport: tr.Record().Name, CID: tr.Record().CID,
	}.argv()
	// A reset of the machine is among what is tested.
	args = slices.DeleteFunc(args, func(s string) bool { return s == "-no-reboot" })
	g.qemu = exec.Command(qemu, args...)
	g.qemu.ExtraFiles = []*os.File{vmlinux, initrd, qmp, ends.QEMU}
	g.qemu.Stdout, g.qemu.Stderr = g.log, g.log
	startProcess(t, g.qemu)
	for _, f := range []*os.File{vmlinux, initrd, qmp} {
		_ = f.Close()
	}
	ends.close()
	return g
}

func startProcess(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
}

// dial takes a connection and says what the guest shall do with it.
func (g *transportGuest) dial(t *testing.T, command string) net.Conn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootPatience)
	defer cancel()
	conn, err := g.t.Dial(ctx)
	if err != nil {
		t.Fatalf("cannot dial the guest: %v\n%s", err, g.log)
	}
	t.Cleanup(func() { _ = conn.Close() })
	_ = conn.SetDeadline(time.Now().Add(transportPatience))
	if _, err := fmt.Fprintln(conn, command); err != nil {
		t.Fatal(err)
	}
	return conn
}

// echo proves that a connection of its own works.
func (g *transportGuest) echo(t *testing.T, text string) {
	t.Helper()
	conn := g.dial(t, "echo")
	defer conn.Close()
	if _, err := io.WriteString(conn, text); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, len(text))
	if _, err := io.ReadFull(conn, got); err != nil || string(got) != text {
		t.Fatalf("the guest echoed %q, %v; want %q", got, err, text)
	}
}

func newToken(t *testing.T) (token bootToken) {
	t.Helper()
	_, _ = rand.Read(token[:])
	return token
}

func TestVhostUserTransport(t *testing.T) {
	token := newToken(t)
	dir := t.TempDir()
	tr, ends, err := newVhostUser(dir, token)
	if err != nil {
		t.Fatal(err)
	}
	g := bootTransport(t, tr, ends, token, accelTCG)
	g.dir = dir
	g.suite(t)

	t.Run("another daemon attaches", func(t *testing.T) {
		if err := g.t.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := g.t.Dial(t.Context()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Dial after Close: %v", err)
		}
		if g.t, err = attachVhostUser(dir, tr.Record(), token); err != nil {
			t.Fatal(err)
		}
		g.echo(t, "again")
	})
	t.Run("guest reset", g.testReset)
	t.Run("helper is small", func(t *testing.T) {
		status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", g.helper.Process.Pid))
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(status)) {
			for _, name := range []string{"VmRSS:", "RssAnon:", "Threads:", "NoNewPrivs:", "Seccomp:"} {
				if strings.HasPrefix(line, name) {
					t.Log(strings.TrimSpace(line))
				}
			}
		}
		for _, want := range []string{"NoNewPrivs:\t1", "Seccomp:\t2"} {
			if !strings.Contains(string(status), want) {
				t.Errorf("the helper's status lacks %s", want)
			}
		}
	})
	t.Run("QEMU killed", func(t *testing.T) {
		g.testKill(t)
		if err := g.helper.Wait(); err != nil {
			t.Errorf("the helper ended with %v\n%s", err, g.log)
		}
		if _, err := g.t.Dial(t.Context()); err == nil {
			t.Error("Dial found a guest that is gone")
		}
	})
}

// TestKernelTransport needs KVM only to be quick.
func TestKernelTransport(t *testing.T) {
	whole, state, log := t, t.TempDir(), zaptest.NewLogger(t)
	hub, err := newKernelHub(state, log)
	if err != nil {
		t.Skipf("%v; make test-host runs this in a host that has it", err)
	}
	closeHub := sync.OnceFunc(func() {
		if err := hub.Close(); err != nil {
			t.Errorf("cannot close the hub: %v", err)
		}
	})
	t.Cleanup(closeHub)
	token := newToken(t)
	tr, ends, err := hub.newTransport(token)
	if err != nil {
		t.Fatal(err)
	}
	g := bootTransport(t, tr, ends, token, testAccel())
	g.suite(t)

	t.Run("another daemon attaches", func(t *testing.T) {
		closeHub()
		if _, err := g.t.Dial(t.Context()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Dial after Close: %v", err)
		}
		next, err := newKernelHub(state, log)
		if err != nil {
			t.Fatal(err)
		}
		whole.Cleanup(func() { _ = next.Close() })
		if next.port != tr.Record().Port {
			t.Errorf("the next daemon listens on %d, the guest dials %d", next.port, tr.Record().Port)
		}
		if g.t, err = next.attach(tr.Record(), token); err != nil {
			t.Fatal(err)
		}
		g.echo(t, "again")
		if _, err := next.attach(tr.Record(), token); err == nil {
			t.Error("a context ID was given to two guests")
		}
	})
	// A guest's reset is not among it: the kernel leaves connections open that nobody will ever close, until QEMU ends. Ours
	// ends with the reset.
	t.Run("QEMU killed", func(t *testing.T) {
		g.testKill(t)
		if err := g.t.Close(); err != nil {
			t.Error(err)
		}
		if _, err := g.t.Dial(t.Context()); !errors.Is(err, net.ErrClosed) {
			t.Errorf("Dial after Close: %v", err)
		}
	})
}

// suite is what both transports do alike.
func (g *transportGuest) suite(t *testing.T) {
	started := time.Now()
	g.echo(t, "first")
	t.Logf("first echo after %v", time.Since(started).Round(time.Millisecond))
	t.Run("echo latency", g.testLatency)
	t.Run("bulk to the guest", g.testSink)
	t.Run("bulk from the guest", g.testSource)
	t.Run("32 streams with one stalled", g.testStreams)
	t.Run("half-close", g.testHalfClose)
	t.Run("guest hangs up", g.testHangup)
	t.Run("nobody dials in time", g.testDialTimeout)
}

func (g *transportGuest) testLatency(t *testing.T) {
	conn := g.dial(t, "echo")
	defer conn.Close()
	var took []time.Duration
	b := make([]byte, 64)
	for range 300 {
		started := time.Now()
		if _, err := conn.Write(b); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, b); err != nil {
			t.Fatal(err)
		}
		took = append(took, time.Since(started))
	}
	slices.Sort(took)
	t.Logf("64 bytes there and back: median %v, 99%% within %v", took[len(took)/2], took[len(took)*99/100])
}

// Enough for every buffer on the way to fill up many times.
const bulkSize = 24 << 20

func (g *transportGuest) testSink(t *testing.T) {
	conn := g.dial(t, "sink")
	h := sha256.New()
	started := time.Now()
	if _, err := io.CopyN(io.MultiWriter(conn, h), mathrand.NewChaCha8([32]byte{1}), bulkSize); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if want := fmt.Sprintf("%x\n", h.Sum(nil)); err != nil || string(got) != want {
		t.Fatalf("the guest's sum is %q, %v; want %q", got, err, want)
	}
	logRate(t, bulkSize, time.Since(started))
}

func (g *transportGuest) testSource(t *testing.T) {
	conn := g.dial(t, "source "+strconv.Itoa(bulkSize))
	started := time.Now()
	h := sha256.New()
	n, err := io.Copy(h, conn)
	took := time.Since(started)
	want := sha256.New()
	_, _ = io.CopyN(want, mathrand.NewChaCha8([32]byte{}), bulkSize)
	if err != nil || n != bulkSize || !bytes.Equal(h.Sum(nil), want.Sum(nil)) {
		t.Fatalf("%d bytes of %d came, %v, or others than were sent", n, bulkSize, err)
	}
	logRate(t, bulkSize, took)
}

func logRate(t *testing.T, bytes int, took time.Duration) {
	t.Helper()
	t.Logf("%d MB in %v: %.0f MB/s, sums included", bytes>>20, took.Round(time.Millisecond), float64(bytes)/1e6/took.Seconds())
}

func (g *transportGuest) testStreams(t *testing.T) {
	stalled := g.dial(t, "hold")
	// Until nothing more goes in.
	_ = stalled.SetWriteDeadline(time.Now().Add(2 * time.Second))
	if _, err := io.Copy(stalled, neverEnding{}); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("writing to a guest that reads nothing: %v", err)
	}
	var streams sync.WaitGroup
	for i := range 31 {
		conn := g.dial(t, "echo")
		streams.Go(func() {
			data := bytes.Repeat([]byte{byte(i)}, 200_000)
			var writing sync.WaitGroup
			writing.Go(func() {
				if _, err := conn.Write(data); err != nil {
					t.Errorf("stream %d: %v", i, err)
				}
			})
			got := make([]byte, len(data))
			if n, err := io.ReadFull(conn, got); err != nil || !bytes.Equal(got, data) {
				t.Errorf("stream %d: read %d bytes, %v, or others than were sent", i, n, err)
			}
			writing.Wait()
		})
	}
	streams.Wait()
}

type neverEnding struct{}

func (neverEnding) Read(b []byte) (int, error) { return len(b), nil }

func (g *transportGuest) testHalfClose(t *testing.T) {
	conn := g.dial(t, "echo")
	if _, err := io.WriteString(conn, "the last word"); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	got, err := io.ReadAll(conn)
	if err != nil || string(got) != "the last word" {
		t.Fatalf("read %q, %v", got, err)
	}
}

func (g *transportGuest) testHangup(t *testing.T) {
	conn := g.dial(t, "hangup")
	r := bufio.NewReader(conn)
	if _, err := r.ReadByte(); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatalf("a connection that the guest closed reads %v", err)
	}
}

// testDialTimeout takes the connection that the guest keeps; it dials no other before that one was spoken on.
func (g *transportGuest) testDialTimeout(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), bootPatience)
	defer cancel()
	conn, err := g.t.Dial(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() // and the guest dials anew
	short, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := g.t.Dial(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("Dial: %v, want a deadline that is exceeded", err)
	}
}

// testKill kills QEMU: what was open ends.
func (g *transportGuest) testKill(t *testing.T) {
	conn := g.dial(t, "echo")
	if err := g.qemu.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = g.qemu.Wait() // killed
	if _, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a connection of a guest that is gone reads %v", err)
	}
}

// testReset resets the machine: what was open ends, and the guest that comes up again is served.
func (g *transportGuest) testReset(t *testing.T) {
	open := g.dial(t, "echo")
	g.dial(t, "reset")
	if _, err := io.Copy(io.Discard, open); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a connection outlived the guest's reset")
	}
	g.echo(t, "up again")
}
