package container_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/idrange"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/runtime/container"
	"github.com/sandboxd/sandboxd/pkg/runtime/runtimetest"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// programsEnv names a directory of built programs, for hosts that have no Go.
const programsEnv = "SANDBOXD_TEST_PROGRAMS"

// buildAgent makes the agent that sandboxes really run.
func buildAgent(t *testing.T) string {
	t.Helper()
	if dir := os.Getenv(programsEnv); dir != "" {
		return filepath.Join(dir, "sandbox-agent")
	}
	path := filepath.Join(t.TempDir(), "sandbox-agent")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", path, "github.com/sandboxd/sandboxd/cmd/sandbox-agent")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("cannot build the agent: %v: %s", err, out)
	}
	return path
}

func TestConformance(t *testing.T) { conformance(t, container.Pool{}) }

// A pool changes nothing but how long a start takes.
func TestConformanceWithPool(t *testing.T) {
	conformance(t, container.Pool{Size: 3, DiskBytes: runtimetest.Resources.DiskBytes})
}

func conformance(t *testing.T, pool container.Pool) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root for namespaces, mounts and cgroups: run the tests as root")
	}
	// A scenario's second daemon is in this process too, and its sandboxes' parent ended with the first. They come to this
	// process then, and not to an init that may take seconds to reap them.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) //nolint:errcheck // a test's
	agent := buildAgent(t)
	parent := fmt.Sprintf("/sandboxd-test-%d-conformance", os.Getpid())
	defer func() {
		if err := cgroup.RemoveParent(parent); err != nil {
			t.Error(err)
		}
	}()
	templates := t.TempDir()
	runtimetest.Run(t, runtimetest.Factory{
		Isolation: spec.IsolationContainer,
		Parallel:  10,
		New: func(t *testing.T, dir string) runtime.Runtime {
			ids, err := idrange.Open(filepath.Join(dir, "ids"))
			if err != nil {
				t.Fatal(err)
			}
			r, err := container.New(container.Config{
				RunDir: filepath.Join(dir, "run"), StateDir: filepath.Join(dir, "state"),
				CgroupParent: parent, Agent: agent, Logger: zaptest.NewLogger(t),
				Disk: disk.NewMaker(templates), IDs: ids, Pool: pool,
			})
			if err != nil {
				t.Fatal(err)
			}
			r.Warm()
			return r
		},
	})
}
