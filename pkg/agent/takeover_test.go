package agent_test

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
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
