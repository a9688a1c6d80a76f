package agent_test

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/agent/guest"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// TestPlain: the agent without walls, that tests of other packages use, keeps the same promises to the daemon.
func TestPlain(t *testing.T) {
	dir := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	served := make(chan error, 1)
	done := make(chan struct{})
	go func() {
		defer close(done)
		served <- guest.ServePlain(t.Context(), l)
	}()
	s := &sandbox{t: t, done: done, proxy: &breaker{}}
	s.Client = agent.New(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", l.Addr().String())
	}, done)
	defer s.Close()
	config := testConfig()
	config.Process.Env = []string{"PATH=" + os.Getenv("PATH")}
	s.base = config.Process
	if _, err := s.Configure(t.Context(), "h", nil); err != nil {
		t.Fatal(err)
	}
	if err := s.CreateContainer(t.Context(), agent.Container{ID: theContainer, Config: config}); err != nil {
		t.Fatal(err)
	}
	if r := s.run(process{args: []string{"sh", "-c", "echo out; echo err >&2; exit 7"}}); r.stdout != "out\n" || r.stderr != "err\n" || r.exit.Code != 7 {
		t.Errorf("%+v", r)
	}
	if _, err := s.start(process{args: []string{"nosuchprogram"}}); spec.ReasonOf(err) != spec.ReasonProcessNotFound {
		t.Errorf("got %v", err)
	}
	if r := s.run(process{args: []string{"sh", "-c", "stty size"}, tty: &specs.Box{Height: 7, Width: 9}}); r.stdout != "7 9\r\n" {
		t.Errorf("%+v", r)
	}
	if err := os.WriteFile(filepath.Join(dir, "file"), []byte("content"), 0o640); err != nil {
		t.Fatal(err)
	}
	var stream bytes.Buffer
	if err := s.CopyOut(t.Context(), theContainer, filepath.Join(dir, "file"), &stream); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "to"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.CopyIn(t.Context(), theContainer, filepath.Join(dir, "to"), &stream); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "to", "file")); err != nil || string(b) != "content" {
		t.Errorf("copied %q %v", b, err)
	}
	s.mustStart("sleep", "1000")
	for script, want := range map[string]spec.Exit{
		"sleep 1000 >/dev/null 2>&1 & echo $!; kill -TERM $$": {Code: 128 + 15, Signal: 15},
		"sleep 1000 >/dev/null 2>&1 & echo $!; exit 9":        {Code: 9},
	} {
		r := s.run(process{args: []string{"sh", "-c", script}})
		orphan, err := strconv.Atoi(strings.TrimSpace(r.stdout))
		if err != nil || r.exit.Code != want.Code || r.exit.Signal != want.Signal {
			t.Fatalf("%q: %+v", script, r)
		}
		pidfd, err := unix.PidfdOpen(orphan, 0)
		if err != nil {
			t.Fatalf("what a process left running has ended with it: %v", err)
		}
		t.Cleanup(func() {
			defer unix.Close(pidfd)
			if n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(patience.Milliseconds())); err != nil || n != 1 {
				t.Errorf("what %q left running runs on: %d, %v", script, n, err)
				_ = unix.PidfdSendSignal(pidfd, unix.SIGKILL, nil, 0)
			}
		})
	}
	if err := s.Shutdown(t.Context(), 0); err != nil {
		t.Error(err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
}

// TestNoPlainAgentInProgram: the agent without walls is not in the program that walls are built around.
func TestNoPlainAgentInProgram(t *testing.T) {
	symbols, err := exec.Command("go", "tool", "nm", agentProgram).Output()
	if err != nil {
		t.Fatal(err)
	}
	if bytes.Contains(symbols, []byte("plainWall")) || bytes.Contains(symbols, []byte("ServePlain")) {
		t.Error("ServePlain is linked into sandbox-agent")
	}
	if !bytes.Contains(symbols, []byte("containerWall")) {
		t.Error("this test looks for names that are not there")
	}
}
