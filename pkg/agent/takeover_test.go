package agent_test

import (
	"archive/tar"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// TestSignalsToTheAgent: root of the sandbox can't end PID 1 with any signal.
func TestSignalsToTheAgent(t *testing.T) {
	s := newSandbox(t)
	s.sh("for i in $(seq 1 64); do for n in 1 2 3; do kill -$i 1; done; done")
	if got := s.sh("echo still here"); got != "still here" {
		t.Errorf("got %q", got)
	}
}

// TestMountedProc: a workload that may mount does not choose what the agent executes.
func TestMountedProc(t *testing.T) {
	s := newSandbox(t, func(c *specs.Spec, root string) {
		c.Process.Capabilities.Bounding = append(slices.Clone(defaultCaps), "CAP_SYS_ADMIN")
		c.Process.Capabilities.Permitted = c.Process.Capabilities.Bounding
		c.Process.Capabilities.Effective = c.Process.Capabilities.Bounding
		fake := filepath.Join(root, "fake", "self")
		if err := os.MkdirAll(fake, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(fake, "exe"), []byte("#!/bin/sh\necho >/tmp/hijacked\n"), 0o755); err != nil {
			t.Fatal(err)
		}
	})
	s.sh("mount -o bind /fake /proc")
	// With the shell's own commands only: busybox starts the rest through /proc/self/exe.
	if got := s.sh("read line </proc/self/exe; echo \"$line\"; [ ! -e /tmp/hijacked ] || echo hijacked"); got != "#!/bin/sh" {
		t.Errorf("the workload's own view: %q", got)
	}
}

// TestStageIsUndumpable: also where anybody may read its program, as in a guest, nobody may trace a stage.
func TestStageIsUndumpable(t *testing.T) {
	if err := os.Chmod(filepath.Dir(agentProgram), 0o755); err != nil {
		t.Fatal(err)
	}
	orders, err := os.Create(filepath.Join(t.TempDir(), "orders"))
	if err != nil {
		t.Fatal(err)
	}
	defer orders.Close()
	if _, err := orders.WriteString(`{"in":true,"path":"/"}`); err != nil {
		t.Fatal(err)
	}
	status, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer status.Close()
	defer theirs.Close()
	const nobody = 65534
	stage := exec.CommandContext(t.Context(), agentProgram)
	stage.Args = []string{"sandbox-stage"}
	stage.ExtraFiles = []*os.File{orders, theirs}
	stage.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}, Pdeathsig: unix.SIGKILL}
	var stderr strings.Builder
	stage.Stderr = &stderr
	in, err := stage.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := stage.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = stage.Process.Kill()
		_ = stage.Wait()
	}()
	// A header of half a MiB, and only the first half of it, which no pipe holds: once it is written the stage is at work,
	// and it goes on waiting for the rest.
	const size = 1 << 19
	stream := tarOf(t, tar.Header{Name: "x", Typeflag: tar.TypeReg, PAXRecords: map[string]string{"TEST.long": strings.Repeat("x", size)}})
	if _, err := in.Write(stream.Bytes()[:size/2]); err != nil {
		theirs.Close()
		said, _ := io.ReadAll(status)
		t.Fatalf("%v; the stage says %q and ended by %v: %s", err, said, stage.Wait(), &stderr)
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/"+strconv.Itoa(stage.Process.Pid)+"/mem", &st); err != nil {
		t.Fatal(err)
	}
	if st.Uid != 0 { // proc_pid(5): what shows a process that is not dumpable is root's
		t.Errorf("the stage is dumpable: its memory belongs to %d", st.Uid)
	}
}
