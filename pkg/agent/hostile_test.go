package agent_test

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// hostile is an agent that was taken over.
type hostile struct {
	agentv1.AgentServiceService
	calls atomic.Int32
}

func (h *hostile) Configure(context.Context, *agentv1.ConfigureRequest) (*agentv1.ConfigureResponse, error) {
	return &agentv1.ConfigureResponse{
		ProtocolVersion: spec.ProtocolVersion, KernelRelease: "\x1b[2J6.1" + strings.Repeat("x", 1<<18), BootId: "a\nb",
	}, nil
}

func (h *hostile) Exec(context.Context, *agentv1.ExecRequest) (*agentv1.ExecResponse, error) {
	return &agentv1.ExecResponse{Pid: 1}, nil
}

func (h *hostile) Release(context.Context, *agentv1.ReleaseRequest) (*agentv1.ReleaseResponse, error) {
	return &agentv1.ReleaseResponse{}, nil
}

func (h *hostile) ReadOutput(_ context.Context, r *agentv1.ReadOutputRequest) (*agentv1.ReadOutputResponse, error) {
	switch r.ProcessId {
	case "more": // more than was asked for
		return &agentv1.ReadOutputResponse{Chunks: []*agentv1.Chunk{{Stream: 1, Data: make([]byte, 3<<20)}}}, nil
	case "idle": // nothing, and at once
		h.calls.Add(1)
		return &agentv1.ReadOutputResponse{}, nil
	case "empty":
		h.calls.Add(1)
		return &agentv1.ReadOutputResponse{Chunks: []*agentv1.Chunk{{Stream: 1}}}, nil
	}
	return nil, status.Error(codes.Internal, "\x1b]0;evil\a"+strings.Repeat("y", 1<<18))
}

func (h *hostile) WriteInput(_ context.Context, r *agentv1.WriteInputRequest) (*agentv1.WriteInputResponse, error) {
	if r.ProcessId == "idle" {
		h.calls.Add(1)
		return &agentv1.WriteInputResponse{Accepted: r.Offset}, nil
	}
	return &agentv1.WriteInputResponse{Accepted: r.Offset - 1}, nil
}

func (h *hostile) Wait(context.Context, *agentv1.WaitRequest) (*agentv1.WaitResponse, error) {
	return &agentv1.WaitResponse{Exited: true, Code: 1 << 30}, nil
}

func serveHostile(t *testing.T, service agentv1.AgentServiceService) *agent.Client {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		t.Fatal(err)
	}
	agentv1.RegisterAgentServiceService(server, service)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve(context.WithoutCancel(t.Context()), l)
	}()
	c := agent.New(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", l.Addr().String())
	}, make(chan struct{}))
	t.Cleanup(func() {
		c.Close()
		_ = server.Close()
		<-served
	})
	return c
}

func TestHostileAgent(t *testing.T) {
	h := &hostile{}
	c := serveHostile(t, h)
	claims, err := c.Configure(t.Context(), "h", nil)
	if err != nil || len(claims.KernelRelease) > 128 || strings.ContainsAny(claims.KernelRelease+claims.BootID, "\x1b\n") {
		t.Errorf("claims %q %q %v", claims.KernelRelease, claims.BootID, err)
	}
	if _, err := c.Start(t.Context(), "c", "p", testConfig().Process, false); spec.KindOf(err) != spec.KindInternal {
		t.Errorf("pid 1 as a process: %v", err)
	}
	for _, id := range []string{"more", "empty", "refused"} {
		chunks, _, err := c.Process(id).ReadOutput(t.Context(), 0)
		if err == nil || len(chunks) > 0 || len(err.Error()) > 2000 || strings.ContainsRune(err.Error(), 0x1b) {
			t.Errorf("%s: %d chunks, %.100q", id, len(chunks), err)
		}
	}
	if h.calls.Load() != 1 {
		t.Errorf("an answer that breaks the protocol was asked for %d times", h.calls.Load())
	}
	if _, _, err := c.Process("p").WriteInput(t.Context(), 5, []byte("x"), false); spec.KindOf(err) != spec.KindInternal {
		t.Errorf("less accepted than before: %v", err)
	}
	if _, err := c.Process("p").Wait(t.Context()); spec.KindOf(err) != spec.KindInternal {
		t.Errorf("exit code 2^30: %v", err)
	}
}

// TestNoBusyLoop: an agent that answers at once, again and again, that there is nothing, is asked less and less often.
func TestNoBusyLoop(t *testing.T) {
	h := &hostile{}
	c := serveHostile(t, h)
	idle := c.Process("idle")
	for name, call := range map[string]func(context.Context) error{
		"read": func(ctx context.Context) error { _, _, err := idle.ReadOutput(ctx, 0); return err },
		"write": func(ctx context.Context) error {
			_, _, err := idle.WriteInput(ctx, 0, []byte("x"), false)
			return err
		},
	} {
		h.calls.Store(0)
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		err := call(ctx)
		cancel()
		// 5, 10, … 320, 500 ms: ten calls at most. Without any delay it is many thousands.
		if n := h.calls.Load(); !errors.Is(err, context.DeadlineExceeded) || n > 12 {
			t.Errorf("%s: %d calls in two seconds, %v", name, n, err)
		}
	}
}

// TestAgentThatStopsReading: no call waits for ever for a lock that another one holds while it writes.
func TestAgentThatStopsReading(t *testing.T) {
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := agent.New(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", l.Addr().String()) // into the backlog: nobody ever reads
	}, make(chan struct{}))
	defer c.Close()
	writing, stop := context.WithCancel(t.Context())
	defer stop()
	var all sync.WaitGroup
	all.Go(func() { _, _, _ = c.Process("p").WriteInput(writing, 0, make([]byte, 1<<20), false) })
	for range 5 {
		all.Go(func() {
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if err := c.Process("p").Signal(ctx, 9, false); !errors.Is(err, context.DeadlineExceeded) {
				t.Errorf("got %v", err)
			}
			stop()
		})
	}
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		all.Wait()
	}()
	select {
	case <-returned:
	case <-time.After(patience):
		t.Fatal("calls never return")
	}
}

// TestGarbageInsteadOfProtocol: bytes that are no protocol end the connection and the call; what comes later gets a new one.
func TestGarbageInsteadOfProtocol(t *testing.T) {
	dials := 0
	c := agent.New(func(context.Context) (net.Conn, error) {
		dials++
		ours, theirs := net.Pipe()
		go func() {
			_, _ = theirs.Read(make([]byte, 1))
			go func() { _, _ = theirs.Write([]byte{0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 2, 0}) }()
			_, _ = io.Copy(io.Discard, theirs) // until ours is closed
		}()
		return ours, nil
	}, make(chan struct{}))
	defer c.Close()
	for range 3 {
		if _, err := c.Stats(t.Context()); spec.KindOf(err) != spec.KindInternal || !strings.Contains(err.Error(), "broke the protocol") {
			t.Errorf("got %v", err)
		}
	}
	if dials != 3 {
		t.Errorf("%d connections were made", dials)
	}
}

// TestFramesWithoutEnd: an agent that sends frames which answer nothing, for ever, has its call fail at once, and say why.
func TestFramesWithoutEnd(t *testing.T) {
	c := agent.New(func(context.Context) (net.Conn, error) {
		ours, theirs := net.Pipe()
		go func() { _, _ = io.Copy(io.Discard, theirs) }()
		go func() {
			for { // until ours is closed
				if _, err := theirs.Write([]byte{0, 0, 0, 0, 0x40, 0, 0, 1, 2, 0}); err != nil {
					return
				}
			}
		}()
		return ours, nil
	}, make(chan struct{}))
	defer c.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if _, err := c.Process("p").Wait(ctx); spec.KindOf(err) != spec.KindInternal || !strings.Contains(err.Error(), "broke the protocol: an answer to call") {
		t.Errorf("got %v", err)
	}
}

// TestGone: calls of a sandbox that has ended say so, also those that wait.
func TestGone(t *testing.T) {
	done := make(chan struct{})
	dialled := make(chan struct{})
	c := agent.New(func(context.Context) (net.Conn, error) {
		ours, _ := net.Pipe() // nobody answers
		close(dialled)
		return ours, nil
	}, done)
	defer c.Close()
	result := make(chan error)
	go func() {
		_, err := c.Stats(t.Context())
		result <- err
	}()
	<-dialled
	close(done)
	if err := <-result; spec.KindOf(err) != spec.KindWrongState {
		t.Errorf("a call under way: %v", err)
	}
	if _, err := c.Stats(t.Context()); spec.KindOf(err) != spec.KindWrongState {
		t.Errorf("a call afterwards: %v", err)
	}
	if err := c.Shutdown(t.Context(), 0); err != nil {
		t.Errorf("shutting down what has ended: %v", err)
	}
}

// TestCancelledCallKeepsConnection: one caller's impatience costs the others nothing.
func TestCancelledCallKeepsConnection(t *testing.T) {
	s := newSandbox(t)
	p := s.mustStart("sleep", "100")
	for range 20 {
		ctx, cancel := context.WithCancel(t.Context())
		waited := make(chan error)
		go func() {
			_, err := p.Wait(ctx)
			waited <- err
		}()
		cancel()
		if err := <-waited; !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		s.sh("true")
	}
	if n := s.proxy.made(); n != 1 {
		t.Errorf("%d connections were made", n)
	}
	if _, err := os.Stat(s.socket); err != nil {
		t.Errorf("the agent took its socket's name away: %v", err)
	}
}
