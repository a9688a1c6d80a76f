package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/idrange"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const crashEnv = "SANDBOXD_TEST_CRASH"

// crash says where a daemon kills itself.
type crash struct {
	Dir, Parent string
	Sandbox     spec.Sandbox
	AfterStep   int
	// When a daemon with a pool dies instead.
	Pool string
}

// crashingDaemon is the daemon's half of TestDaemonDiesInTheMiddleOfAStart, in a process of its own.
func crashingDaemon(at string) {
	var c crash
	err := json.Unmarshal([]byte(at), &c)
	h := hostAt(c.Dir, c.Parent)
	if err == nil && c.Pool != "" {
		err = crashWithPool(h, c)
		fmt.Fprintln(os.Stderr, "the daemon lives:", err)
		os.Exit(1)
	}
	if err == nil {
		h.config.IDs, err = idrange.Open(filepath.Join(c.Dir, "ids"))
	}
	var r *Runtime
	if err == nil {
		r, err = New(h.config)
	}
	if err == nil {
		steps = append(steps[:c.AfterStep+1:c.AfterStep+1], step{name: "crash", run: func(*start, context.Context) error {
			return unix.Kill(os.Getpid(), unix.SIGKILL)
		}})
		_, err = r.Start(context.Background(), c.Sandbox)
	}
	fmt.Fprintln(os.Stderr, "the daemon lives:", err)
	os.Exit(1)
}

func TestDaemonDiesInTheMiddleOfAStart(t *testing.T) {
	// Orphans come to this process, and not to an init that may be slow to reap them.
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) //nolint:errcheck // a test's
	for n, step := range steps {
		t.Run(strconv.Itoa(n)+" "+step.name, func(t *testing.T) {
			h := newHost(t)
			s := h.sandbox(1)
			at, err := json.Marshal(crash{Dir: filepath.Dir(h.config.RunDir), Parent: h.config.CgroupParent, Sandbox: s, AfterStep: n})
			if err != nil {
				t.Fatal(err)
			}
			cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
			cmd.Env = append(os.Environ(), crashEnv+"="+string(at))
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.Sys().(interface{ Signaled() bool }).Signaled() == false {
				t.Fatalf("the daemon ended with %v: %s", err, out)
			}
			next := h.daemon(t)
			if ids, err := next.List(t.Context()); err != nil || len(ids) != 1 || ids[0] != s.ID {
				t.Errorf("List = %v, %v", ids, err)
			}
			i, err := next.Attach(t.Context(), s.ID)
			if n == len(steps)-1 {
				if err != nil {
					t.Fatalf("Attach to a whole sandbox: %v", err)
				}
				want(t, i, "echo alive", "alive")
			} else if !errors.Is(err, runtime.ErrNotRunning) {
				t.Errorf("Attach to half a sandbox = %v, want ErrNotRunning", err)
			}
			mustRemove(t, next, s.ID)
			reap(t)
		})
	}
}

// reap waits for all orphans and children that ended: they are killed when this is called.
func reap(t *testing.T) {
	t.Helper()
	deadline := time.Now().Add(20 * time.Second)
	for time.Now().Before(deadline) {
		pid, err := unix.Wait4(-1, nil, 0, nil)
		if errors.Is(err, unix.ECHILD) {
			return
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			t.Errorf("wait: %v, %d", err, pid)
			return
		}
	}
	t.Error("children do not end")
}
