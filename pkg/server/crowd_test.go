package server

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// One who opens more connections than his share is refused; another user is served meanwhile, and he himself when he
// has let go.
func TestManyConnectionsHarmOnlyTheirOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("run this test as root: it calls as another user")
	}
	h := serve(t, Config{Log: zap.NewNop(), Workloads: &fakeWorkloads{create: func(context.Context, workload.CreateOptions) (workload.Workload, error) {
		return workload.Workload{}, nil
	}}})
	if err := errors.Join(os.Chmod(h.socket, 0o666), os.Chmod(filepath.Dir(filepath.Dir(h.socket)), 0o755)); err != nil {
		t.Fatal(err)
	}
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			c.Close()
		}
	}()
	refused := 0
	for range 3 * maxConnectionsPerCaller {
		c, err := net.Dial("unix", h.socket)
		if err != nil {
			t.Fatalf("after %d connections: %v", len(conns), err)
		}
		// The daemon closes what is too much; what it keeps gets its HTTP/2 settings. What was closed already can't be told.
		_, _ = c.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
		c.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.Read(make([]byte, 1)); err != nil {
			refused++
			c.Close()
			continue
		}
		conns = append(conns, c)
	}
	if len(conns) != maxConnectionsPerCaller || refused != 2*maxConnectionsPerCaller {
		t.Errorf("%d connections are open and %d were refused, want %d and %d", len(conns), refused, maxConnectionsPerCaller, 2*maxConnectionsPerCaller)
	}
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	defer self.Close()
	cmd := exec.CommandContext(t.Context(), "/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{self}
	cmd.Env = []string{callAs + "=" + h.socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 12345, Gid: 12345}}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("another user: %v\n%s", err, out)
	}
	for _, c := range conns {
		c.Close()
	}
	conns = nil
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	for {
		_, err := h.workloads.CreateWorkload(ctx, validCreate())
		if err == nil {
			break
		}
		h.conn.ResetConnectBackoff()
		if ctx.Err() != nil {
			t.Fatalf("after letting go: %v", err)
		}
	}
}

// Calls that never end are counted, too, over all connections of a caller.
func TestCallsOfOneCallerAreBounded(t *testing.T) {
	c := newCrowd()
	var leave []func()
	for range maxCallsPerCaller {
		l, err := c.call("uid:1")
		if err != nil {
			t.Fatal(err)
		}
		leave = append(leave, l)
	}
	if _, err := c.call("uid:1"); codeOf(toStatus(t.Context(), err)) != codes.ResourceExhausted {
		t.Errorf("one call too many: %v, want RESOURCE_EXHAUSTED", err)
	}
	if _, err := c.call("uid:2"); err != nil {
		t.Errorf("another caller: %v", err)
	}
	for _, l := range leave {
		l()
	}
	if _, err := c.call("uid:1"); err != nil {
		t.Errorf("after they ended: %v", err)
	}
	if len(c.calls) != 2 {
		t.Errorf("%d callers are remembered, want 2", len(c.calls))
	}
}

// A client that never reads what it asked for holds up its own call and nothing else.
func TestClientThatNeverReads(t *testing.T) {
	written := make(chan struct{}, 1)
	h := serve(t, Config{Log: zap.NewNop(), Workloads: &fakeWorkloads{
		logs: func(_ context.Context, _ string, _ workload.LogOptions, fn func(workload.LogEntry) error) error {
			for {
				if err := fn(workload.LogEntry{Data: make([]byte, 64<<10)}); err != nil {
					return err
				}
				select {
				case written <- struct{}{}:
				default:
				}
			}
		},
		get: func(string) (workload.Workload, error) { return workload.Workload{}, nil },
	}})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	for range 50 {
		if _, err := h.workloads.StreamLogs(ctx, &sandboxdv1.StreamLogsRequest{Id: "x"}); err != nil {
			t.Fatal(err)
		}
	}
	receive(t, written, "the first piece")
	deadline, done := context.WithTimeout(t.Context(), patience)
	defer done()
	if _, err := h.workloads.GetWorkload(deadline, &sandboxdv1.GetWorkloadRequest{Id: "x"}); status.Code(err) != codes.OK {
		t.Errorf("beside streams that nobody reads: %v", err)
	}
}
