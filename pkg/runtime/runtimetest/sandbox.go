package runtimetest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"slices"
	"strings"
	"time"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/oci"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// containerID is the name of the one container in a sandbox.
const containerID = "main"

// Resources of a test's sandbox: little, so that many fit on a small machine, and a disk that is quickly full.
var Resources = spec.Resources{CPUMillis: 1000, MemoryBytes: 192 << 20, Pids: 64, DiskBytes: 64 << 20}

// sandbox is one that a scenario started.
type sandbox struct {
	*host
	id       string
	instance runtime.Instance
	agent    *agent.Client
}

func newID() string {
	b := make([]byte, 16)
	rand.Read(b) // never fails
	return hex.EncodeToString(b)
}

func (h *host) spec(id string) spec.Sandbox {
	return spec.Sandbox{ID: id, ImagePath: h.image, Resources: Resources}
}

// start boots a sandbox with a new id and creates the container in it.
func (h *host) start() *sandbox {
	h.Helper()
	id := newID()
	h.ids = append(h.ids, id)
	return h.startID(id)
}

func (h *host) startID(id string) *sandbox {
	h.Helper()
	s, err := h.tryStart(id)
	if err != nil {
		h.Fatal(err)
	}
	return s
}

// tryStart may be called from any goroutine.
func (h *host) tryStart(id string) (*sandbox, error) {
	instance, err := h.runtime.Start(h.ctx, h.spec(id))
	if err != nil {
		return nil, err
	}
	s := h.connect(id, instance)
	return s, s.create()
}

// create makes the container, as the daemon does.
func (s *sandbox) create() error {
	hostname := "host-" + s.id[:8]
	if _, err := s.agent.Configure(s.ctx, hostname, nil); err != nil {
		return err
	}
	config, err := oci.Config(s.id, spec.Workload{Process: spec.Process{Command: []string{"sh"}}, Hostname: hostname}, spec.ImageConfig{}, s.factory.Isolation)
	if err != nil {
		return err
	}
	filter, err := oci.CompileSeccomp(config.Linux.Seccomp)
	if err != nil {
		return err
	}
	own, err := oci.CompileAgentSeccomp(config.Linux.Seccomp, s.factory.Isolation)
	if err != nil {
		return err
	}
	return s.agent.CreateContainer(s.ctx, agent.Container{ID: containerID, Config: config, Filter: filter, AgentFilter: own})
}

// connect makes a client, closed at the scenario's end.
func (h *host) connect(id string, instance runtime.Instance) *sandbox {
	client := agent.New(instance.Dial, instance.Done())
	h.Cleanup(client.Close)
	return &sandbox{h, id, instance, client}
}

// attach finds the sandbox as the next daemon does.
func (h *host) attach(id string) *sandbox {
	h.Helper()
	instance, err := h.runtime.Attach(h.ctx, id)
	if err != nil {
		h.Fatalf("cannot attach: %v", err)
	}
	return h.connect(id, instance)
}

// launch starts a shell command.
func (s *sandbox) launch(processID, script string, stdin bool) (*agent.Process, error) {
	config, err := oci.Config(s.id, spec.Workload{Process: spec.Process{Command: []string{"sh", "-c", script}}}, spec.ImageConfig{}, s.factory.Isolation)
	if err != nil {
		return nil, err
	}
	return s.agent.Start(s.ctx, containerID, processID, config.Process, stdin)
}

// sh runs a shell command to its end and answers with its output and exit code. It may be called from any goroutine.
func (s *sandbox) sh(script string) (string, int, error) {
	p, err := s.launch(newID(), script, false)
	if err != nil {
		return "", 0, err
	}
	return s.finish(p)
}

// finish reads a process's output to its end and waits for it.
func (s *sandbox) finish(p *agent.Process) (string, int, error) {
	var output []byte
	for eof := false; !eof; {
		chunks, end, err := p.ReadOutput(s.ctx, uint64(len(output)))
		if err != nil {
			return string(output), 0, err
		}
		for _, c := range chunks {
			output = append(output, c.Data...)
		}
		eof = end
	}
	exit, err := p.Wait(s.ctx)
	if err != nil {
		return string(output), 0, err
	}
	return string(output), exit.Code, p.Release(s.ctx)
}

// expect runs a shell command that must succeed, and compares its output.
func (s *sandbox) expect(script, want string) {
	s.Helper()
	got, code, err := s.sh(script)
	if err != nil || code != 0 || strings.TrimSpace(got) != want {
		s.Fatalf("%s: %q, exit code %d, %v; want %q", script, got, code, err, want)
	}
}

// expectEnded waits for Done and looks whether the instance then says so everywhere.
func (s *sandbox) expectEnded() {
	s.Helper()
	select {
	case <-s.instance.Done():
	case <-time.After(endTimeout):
		s.Fatalf("the last host process has not gone in %v", endTimeout)
	}
	if conn, err := s.instance.Dial(s.ctx); !isNotRunning(err) {
		s.Errorf("Dial after Done: %v, %v; want ErrNotRunning", conn, err)
	}
	if err := s.instance.Kill(); err != nil {
		s.Errorf("Kill after Done: %v", err)
	}
}

func (h *host) listed() []string {
	h.Helper()
	ids, err := h.runtime.List(h.ctx)
	if err != nil {
		h.Fatal(err)
	}
	slices.Sort(ids)
	return ids
}

func (h *host) remove(id string) {
	h.Helper()
	if err := h.runtime.Remove(h.ctx, id); err != nil {
		h.Fatalf("cannot remove %s: %v", id, err)
	}
}

// within is a context for what must not take long.
func (h *host) within(d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(h.ctx, d)
	h.Cleanup(cancel)
	return ctx
}
