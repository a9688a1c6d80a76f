package workload

import (
	"context"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/ttrpc"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// `exec sh -c 'sleep 1000 &'` ends with the shell although sleep holds its output.
func TestExecEndsWithItsProcess(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.start(m, "read x")
	s, err := m.Exec(h.ctx(), id, spec.Process{Command: []string{"/bin/sh", "-c", "echo said before; sleep 1000 & exit 9"}})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	s.(*execSession).linger = 100 * time.Millisecond
	waited := make(chan spec.Exit, 1)
	go func() {
		exit, err := s.Wait(h.ctx())
		if err != nil {
			t.Error(err)
		}
		waited <- exit
	}()
	var out strings.Builder
	if err := s.Output(h.ctx(), func(_ Stream, data []byte) error { out.Write(data); return nil }); err != nil {
		t.Error(err)
	}
	if exit := <-waited; out.String() != "said before\n" || exit.Code != 9 {
		t.Errorf("%q, exit %d; want \"said before\", 9", out.String(), exit.Code)
	}
}

// slowAgent has a process that has ended. It is slow to say what the process wrote last.
type slowAgent struct {
	agentv1.AgentServiceService
	output string
	delay  time.Duration
	asked  chan struct{} // closed with the first question for output
	asks   atomic.Int32
}

func (s *slowAgent) Wait(ctx context.Context, _ *agentv1.WaitRequest) (*agentv1.WaitResponse, error) {
	<-s.asked
	return &agentv1.WaitResponse{Exited: true, Code: 3}, nil
}

func (s *slowAgent) ReadOutput(ctx context.Context, r *agentv1.ReadOutputRequest) (*agentv1.ReadOutputResponse, error) {
	if s.asks.Add(1) == 1 {
		close(s.asked)
		<-ctx.Done() // asked while the process ran; given up when it has ended
		return nil, ctx.Err()
	}
	if r.Offset == uint64(len(s.output)) {
		return &agentv1.ReadOutputResponse{}, nil // and then waited in vain
	}
	time.Sleep(s.delay)
	return &agentv1.ReadOutputResponse{Chunks: []*agentv1.Chunk{{Stream: 1, Data: []byte(s.output[r.Offset:])}}}, nil
}

// An answer that is late is not silence: nothing of what the process wrote may be missing from an exec that succeeds.
func TestSlowAgentCutsNoOutput(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	e, err := m.find(h.create(m, "true"))
	if err != nil {
		t.Fatal(err)
	}
	const linger = 10 * time.Millisecond
	slow := &slowAgent{output: "said last", delay: 20 * linger, asked: make(chan struct{})}
	s := newExecSession(e, nil, serveAgent(t, slow).Process("x"), "x")
	s.linger = linger
	ended := make(chan error, 1)
	go func() {
		_, err := s.Wait(h.ctx())
		ended <- err
	}()
	var out strings.Builder
	if err := s.Output(h.ctx(), func(_ Stream, data []byte) error { out.Write(data); return nil }); err != nil {
		t.Error(err)
	}
	if err := <-ended; err != nil || out.String() != slow.output {
		t.Errorf("%q, %v; want %q", out.String(), err, slow.output)
	}
}

func serveAgent(t *testing.T, service agentv1.AgentServiceService) *agent.Client {
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
