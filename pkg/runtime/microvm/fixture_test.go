package microvm

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/idrange"
	"github.com/sandboxd/sandboxd/pkg/oci"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// testTimeout bounds what a test does with a VM, many at once under emulation on a small machine included.
	testTimeout = 3 * time.Minute
	guestMemory = 128 << 20
)

const (
	// programsVariable names a directory with the programs that tests run, for hosts that have no Go.
	programsVariable = "SANDBOXD_TEST_PROGRAMS"
	// accelVariable names the accelerator that tests use, for hosts where KVM runs guests: TCG if it is not set.
	accelVariable = "SANDBOXD_TEST_ACCEL"
)

func testAccel() string {
	if accel := os.Getenv(accelVariable); accel != "" {
		return accel
	}
	return AccelTCG
}

// testTrial is generous where KVM is known to work: then slowness is no verdict.
func testTrial() time.Duration {
	if testAccel() == AccelKVM {
		return testTimeout
	}
	return 0
}

// programsDir is where programs lie once they are built.
var programsDir string

// programs are built once for all tests, when the first one needs them.
var programs = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "sandboxd-microvm-test-")
	if err != nil {
		return "", err
	}
	programsDir = dir
	// The vsock helper runs as a user of its own.
	if err := os.Chmod(dir, 0o755); err != nil {
		return dir, err
	}
	for _, pkg := range []string{"../../../cmd/sandbox-agent", "../../../cmd/sandbox-vsock", "./testdata/rogue", "./testdata/jailbreak", "./testdata/draws"} {
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", dir+"/", pkg)
		if built := os.Getenv(programsVariable); built != "" {
			cmd = exec.Command("cp", filepath.Join(built, filepath.Base(pkg)), dir+"/")
		}
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return dir, fmt.Errorf("cannot build %s: %w: %s", pkg, err, out)
		}
	}
	if os.Getenv(programsVariable) != "" {
		return dir, busyboxImage(dir) // a host without Go has no test builds
	}
	for name, without := range map[string]string{agedAgent: "youth", unseededAgent: "youth,reseed"} {
		cmd := exec.Command("go", "build", "-trimpath", "-tags=sandboxd_weaken", "-ldflags=-s -w -X github.com/sandboxd/sandboxd/pkg/weaken.built="+without,
			"-o", filepath.Join(dir, name), "../../../cmd/sandbox-agent")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			return dir, fmt.Errorf("cannot build %s: %w: %s", name, err, out)
		}
	}
	return dir, busyboxImage(dir)
})

// Test builds of the agent: one whose templates are old enough for their clones to draw the same if nothing is done about it,
// and one that does nothing about it.
const (
	agedAgent     = "sandbox-agent-aged"
	unseededAgent = "sandbox-agent-unseeded"
)

// busyboxImage makes dir/image.erofs, a root with busybox and the program draws alone.
func busyboxImage(dir string) error {
	bin := filepath.Join(dir, "root", "bin")
	if err := os.MkdirAll(bin, 0o755); err != nil {
		return err
	}
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		return fmt.Errorf("%w: apt-get install busybox-static", err)
	}
	b, err := os.ReadFile(busybox)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(bin, "busybox"), b, 0o755); err != nil {
		return err
	}
	draws, err := os.ReadFile(filepath.Join(dir, "draws"))
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(bin, "draws"), draws, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"sh", "cat", "echo", "sleep", "uname", "true"} {
		if err := os.Symlink("busybox", filepath.Join(bin, name)); err != nil {
			return err
		}
	}
	out, err := exec.Command("mkfs.erofs", filepath.Join(dir, "image.erofs"), filepath.Join(dir, "root")).CombinedOutput()
	if err != nil {
		return fmt.Errorf("mkfs.erofs: %w: %s: apt-get install erofs-utils", err, out)
	}
	return nil
}

func TestMain(m *testing.M) {
	if os.Getenv(daemonVariable) != "" {
		runDaemon()
	}
	code := m.Run()
	if programsDir != "" {
		_ = os.RemoveAll(programsDir)
	}
	os.Exit(code)
}

// bench is the directories of one daemon.
type bench struct {
	dir    string
	config Config
	// Where programs built.
	programs string
}

// newBench makes directories for a runtime, and checks in the end that nothing is left in or outside of them.
func newBench(t *testing.T) *bench {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: run the tests as root")
	}
	built, err := programs()
	if err != nil {
		t.Fatal(err)
	}
	b := &bench{dir: t.TempDir(), programs: built}
	b.config = benchConfig(b.dir, built, realKernel(t))
	b.config.CgroupParent = "sandboxd-test-" + strings.ToLower(rand.Text()[:10])
	b.config.Logger = zaptest.NewLogger(t)
	t.Cleanup(func() { b.checkNothingLeft(t) })
	return b
}

func benchConfig(dir, programs, kernel string) Config {
	ids, err := idrange.Open(filepath.Join(dir, "ids"))
	if err != nil {
		panic(err)
	}
	return Config{
		RunDir: filepath.Join(dir, "run"), StateDir: filepath.Join(dir, "state"), CgroupParent: "sandboxd-test",
		Agent: filepath.Join(programs, "sandbox-agent"), VsockHelper: filepath.Join(programs, "sandbox-vsock"),
		Kernel: kernel, Accel: testAccel(), KVMTrial: testTrial(),
		Disk: disk.NewMaker(filepath.Join(dir, "disk-cache")), IDs: ids,
	}
}

// image is the busybox image.
func (b *bench) image() string {
	return filepath.Join(b.programs, "image.erofs")
}

func (b *bench) useRogue() {
	b.config.Agent = filepath.Join(b.programs, "rogue")
}

func (b *bench) runtime(t *testing.T) *Runtime {
	t.Helper()
	r, err := New(b.config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return r
}

func (b *bench) sandbox() spec.Sandbox {
	id := make([]byte, 16)
	_, _ = rand.Read(id)
	return spec.Sandbox{ID: hex.EncodeToString(id), ImagePath: b.image(), Resources: spec.Resources{CPUMillis: 1000, MemoryBytes: guestMemory, Pids: 100, DiskBytes: 64 << 20}}
}

// checkNothingLeft fails the test if any trace of a VM is on the host.
func (b *bench) checkNothingLeft(t *testing.T) {
	t.Helper()
	b.checkNothingRuns(t)
	if err := cgroup.RemoveParent(b.config.CgroupParent); err != nil {
		t.Error(err)
	}
}

// checkNothingRuns is checkNothingLeft for a test that goes on.
func (b *bench) checkNothingRuns(t *testing.T) {
	t.Helper()
	for _, dir := range []string{"run/microvm", "state/sandbox", "ids"} {
		entries, err := os.ReadDir(filepath.Join(b.dir, dir))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
		for _, e := range entries {
			t.Errorf("left in %s: %s", dir, e.Name())
		}
	}
	groups, err := cgroup.List(b.config.CgroupParent)
	if err != nil || len(groups) > 0 {
		t.Errorf("cgroups left: %v (%v)", groups, err)
	}
	// Every process of ours has something below the directory open, as image, layer, socket or working directory, or is
	// a program of ours.
	links, _ := filepath.Glob("/proc/[0-9]*/*")
	for _, link := range append(links, globFDs()...) {
		target, err := os.Readlink(link)
		if err == nil && strings.HasPrefix(target, b.dir+"/") && !strings.HasPrefix(link, fmt.Sprintf("/proc/%d/", os.Getpid())) {
			t.Errorf("left running: %s → %s", link, target)
		}
	}
}

func globFDs() []string {
	fds, _ := filepath.Glob("/proc/[0-9]*/fd/*")
	return fds
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), testTimeout)
	t.Cleanup(cancel)
	return ctx
}

// vm is a VM with a container in it, ready to run processes.
type vm struct {
	spec.Sandbox
	runtime.Instance
	client *agent.Client
	// Of what it goes on from, where it does.
	container string
}

func (v *vm) containerID() string { return cmp.Or(v.container, v.ID) }

func (b *bench) start(t *testing.T, r *Runtime) *vm {
	t.Helper()
	s := b.sandbox()
	return b.startSandbox(t, r, s)
}

func (b *bench) startSandbox(t *testing.T, r *Runtime, s spec.Sandbox) *vm {
	t.Helper()
	i, err := r.Start(testContext(t), s)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.remove(t, r, s.ID) })
	v := &vm{Sandbox: s, Instance: i, client: agent.New(i.Dial, i.Done())}
	t.Cleanup(v.client.Close)
	v.configure(t)
	return v
}

func (b *bench) remove(t *testing.T, r *Runtime, id string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), testTimeout)
	defer cancel()
	if err := r.Remove(ctx, id); err != nil {
		t.Errorf("remove: %v", err)
	}
}

// testWorkload is what the tests' processes are made from.
var testWorkload = spec.Workload{Image: "busybox", Process: spec.Process{Command: []string{"/bin/true"}}, Resources: spec.Resources{Pids: 100}}

func (v *vm) configure(t *testing.T) {
	t.Helper()
	ctx := testContext(t)
	if _, err := v.client.Configure(ctx, "guest", nil); err != nil {
		t.Fatal(err)
	}
	config, err := oci.Config(v.containerID(), testWorkload, spec.ImageConfig{}, spec.IsolationVM)
	if err != nil {
		t.Fatal(err)
	}
	filter, err := oci.CompileSeccomp(config.Linux.Seccomp)
	if err != nil {
		t.Fatal(err)
	}
	own, err := oci.CompileAgentSeccomp(config.Linux.Seccomp, spec.IsolationVM)
	if err != nil {
		t.Fatal(err)
	}
	if err := v.client.CreateContainer(ctx, agent.Container{ID: v.containerID(), Config: config, Filter: filter, AgentFilter: own}); err != nil {
		t.Fatal(err)
	}
}

// sh runs a shell script in the container and answers with what it printed.
func (v *vm) sh(t *testing.T, script string) string {
	t.Helper()
	out, exit, err := v.run(testContext(t), script)
	if err != nil {
		t.Fatalf("%s: %v", script, err)
	}
	if exit.Code != 0 {
		t.Fatalf("%s: exit code %d: %s", script, exit.Code, out)
	}
	return strings.TrimSpace(out)
}

func (v *vm) run(ctx context.Context, script string) (string, spec.Exit, error) {
	p, err := v.launch(ctx, rand.Text(), script)
	if err != nil {
		return "", spec.Exit{}, err
	}
	var out bytes.Buffer
	for {
		chunks, eof, err := p.ReadOutput(ctx, uint64(out.Len()))
		if err != nil {
			return "", spec.Exit{}, err
		}
		for _, c := range chunks {
			out.Write(c.Data)
		}
		if eof {
			break
		}
	}
	exit, err := p.Wait(ctx)
	return out.String(), exit, errors.Join(err, p.Release(ctx))
}

func (v *vm) launch(ctx context.Context, processID, script string) (*agent.Process, error) {
	config, err := oci.Config(v.containerID(), testWorkload, spec.ImageConfig{}, spec.IsolationVM)
	if err != nil {
		return nil, err
	}
	config.Process.Args = []string{"/bin/sh", "-c", script}
	return v.client.Start(ctx, v.containerID(), processID, config.Process, false)
}

func awaitDone(t *testing.T, i runtime.Instance) {
	t.Helper()
	select {
	case <-i.Done():
	case <-testContext(t).Done():
		t.Fatal("the VM does not end")
	}
}

func sorted(s []string) []string {
	s = slices.Clone(s)
	slices.Sort(s)
	return s
}
