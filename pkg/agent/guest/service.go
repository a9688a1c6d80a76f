package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os/signal"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/rawfork"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// Service answers the daemon. It implements agentv1.AgentServiceService.
type Service struct {
	wall      wall
	processes table
	handover  handover
	// Closed when Shutdown has ended every process.
	over     chan struct{}
	overOnce sync.Once

	mu        sync.Mutex // held while the container is created
	container *container
	broken    error // what went wrong when it was: the sandbox is of no use any more
}

// container is the one container of a sandbox. Pods will have several.
type container struct {
	id     string
	filter []byte
	root   *root
}

func newService(w wall) *Service {
	return &Service{wall: w, over: make(chan struct{})}
}

// Serve answers on l until Shutdown was called or ctx is done, then closes l. A caller that sees it return nil was shut
// down by the daemon.
func (s *Service) Serve(ctx context.Context, l net.Listener) error {
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	agentv1.RegisterAgentServiceService(server, s)
	l = newSortingListener(l, &s.handover)
	failed := make(chan error, 1)
	go func() { failed <- server.Serve(ctx, rogue(l)) }()
	select {
	case <-ctx.Done():
		err = errors.Join(ctx.Err(), server.Close())
	case <-s.over:
		// The answer to Shutdown itself is still on its way.
		wait, cancel := context.WithTimeout(context.WithoutCancel(ctx), closeWait)
		defer cancel()
		_ = server.Shutdown(wait)
		_ = server.Close()
	case err := <-failed:
		return err
	}
	<-failed
	return err
}

// Configure implements agentv1.AgentServiceService.
func (s *Service) Configure(_ context.Context, r *agentv1.ConfigureRequest) (*agentv1.ConfigureResponse, error) {
	if r.ProtocolVersion != spec.ProtocolVersion {
		return nil, wrongState("the agent speaks protocol version %d, not %d", spec.ProtocolVersion, r.ProtocolVersion)
	}
	if n := len(r.Entropy); n < minEntropy || n > maxEntropy {
		return nil, invalid("entropy has %d bytes, not %d to %d", n, minEntropy, maxEntropy)
	}
	if err := r.Now.CheckValid(); err != nil {
		return nil, invalid("now: %v", err)
	}
	n, err := parseNetwork(r.Network)
	if err != nil {
		return nil, invalid("network: %v", err)
	}
	if err := checkMachineID(r.MachineId); err != nil {
		return nil, invalid("machine id: %v", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.wall.configure(r.Hostname, r.Now.AsTime(), r.Entropy, n); err != nil {
		return nil, internal("cannot configure the sandbox: %v", err)
	}
	// Nowhere but in a kernel of its own: elsewhere nobody has ever been somebody else.
	if r.MachineId != "" && s.container != nil && s.wall.ownClock() {
		if err := s.container.rename(r.Hostname, r.MachineId); err != nil {
			return nil, internal("cannot rename the container: %v", err)
		}
	}
	k, err := thisKernel()
	if err != nil {
		return nil, internal("%v", err)
	}
	return &agentv1.ConfigureResponse{
		ProtocolVersion: spec.ProtocolVersion, AgentVersion: spec.Version, KernelRelease: k.release, BootId: k.bootID,
		OwnClock: s.wall.ownClock(),
	}, nil
}

// AdjustClock implements agentv1.AgentServiceService.
func (s *Service) AdjustClock(_ context.Context, r *agentv1.AdjustClockRequest) (*agentv1.AdjustClockResponse, error) {
	if !s.wall.ownClock() {
		return nil, wrongState("a container's clock is the host's")
	}
	if r.By != 0 {
		if err := moveClock(time.Duration(r.By)); err != nil {
			return nil, internal("%v", err)
		}
	}
	return &agentv1.AdjustClockResponse{Now: timestamppb.Now()}, nil
}

// CreateContainer implements agentv1.AgentServiceService.
func (s *Service) CreateContainer(_ context.Context, r *agentv1.CreateContainerRequest) (*agentv1.CreateContainerResponse, error) {
	if _, err := s.createContainer(r); err != nil {
		return nil, err
	}
	return &agentv1.CreateContainerResponse{}, nil
}

// createContainer answers with the decoded config.
func (s *Service) createContainer(r *agentv1.CreateContainerRequest) (*specs.Spec, error) {
	if err := checkID(r.ContainerId); err != nil {
		return nil, err
	}
	config, err := decodeSpec(r.OciConfig)
	if err != nil {
		return nil, err
	}
	for _, filter := range [][]byte{r.SeccompFilter, r.AgentFilter} {
		if err := checkFilter(filter); err != nil {
			return nil, invalid("%v", err)
		}
	}
	if config.Process != nil {
		weaken.Adopt(config.Process.Env)
		if weaken.Without("take signals") {
			signal.Reset(append(ignored, unheard...)...)
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.broken != nil:
		return nil, wrongState("the container could not be created before: %v", s.broken)
	case s.container != nil && s.container.id == r.ContainerId:
		return config, nil // repeated after a lost connection
	case s.container != nil:
		return nil, wrongState("the sandbox has a container already")
	}
	root, err := s.wall.enter(config, r.AgentFilter)
	if err != nil {
		s.broken = err
		if asFailure(err) != nil { // by what was asked for
			return nil, invalid("cannot create the container: %v", err)
		}
		return nil, internal("cannot create the container: %v", err)
	}
	s.container = &container{id: r.ContainerId, filter: r.SeccompFilter, root: root}
	return config, nil
}

// find answers with the container of that id.
func (s *Service) find(id string) (*container, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.container == nil {
		return nil, wrongState("the sandbox has no container yet")
	}
	if s.container.id != id {
		return nil, notFound("container %q is not known", id)
	}
	return s.container, nil
}

// ReadOutput implements agentv1.AgentServiceService.
func (s *Service) ReadOutput(ctx context.Context, r *agentv1.ReadOutputRequest) (*agentv1.ReadOutputResponse, error) {
	if r.MaxBytes < 1 || r.MaxBytes > maxCallBytes {
		return nil, invalid("max_bytes is %d, not 1 to %d", r.MaxBytes, maxCallBytes)
	}
	ctx, cancel := longPoll(ctx, r.WaitMs)
	defer cancel()
	p, err := s.processes.get(ctx, r.ProcessId)
	if err != nil {
		return nil, err
	}
	chunks, eof, err := p.output.read(ctx, r.Offset, int(r.MaxBytes))
	if errors.Is(err, errOffset) {
		return nil, invalid("offset %d: %v", r.Offset, err)
	}
	if err != nil {
		return nil, notFound("%v", err)
	}
	out := &agentv1.ReadOutputResponse{Eof: eof, Chunks: make([]*agentv1.Chunk, len(chunks))}
	for i, c := range chunks {
		out.Chunks[i] = &agentv1.Chunk{Stream: c.stream, Time: timestamppb.New(c.time), Data: c.data}
	}
	return out, nil
}

// WriteInput implements agentv1.AgentServiceService.
func (s *Service) WriteInput(ctx context.Context, r *agentv1.WriteInputRequest) (*agentv1.WriteInputResponse, error) {
	if len(r.Data) > maxCallBytes {
		return nil, invalid("data has %d bytes, more than %d", len(r.Data), maxCallBytes)
	}
	p, err := s.processes.get(ctx, r.ProcessId)
	if err != nil {
		return nil, err
	}
	if p.input == nil {
		return &agentv1.WriteInputResponse{Closed: true}, nil // it reads /dev/null
	}
	accepted, closed, err := p.input.write(ctx, r.Offset, r.Data, r.Eof)
	if err != nil {
		return nil, invalid("offset %d of %d: %v", r.Offset, accepted, err)
	}
	return &agentv1.WriteInputResponse{Accepted: accepted, Closed: closed}, nil
}

// Resize implements agentv1.AgentServiceService.
func (s *Service) Resize(ctx context.Context, r *agentv1.ResizeRequest) (*agentv1.ResizeResponse, error) {
	p, err := s.processes.get(ctx, r.ProcessId)
	if err != nil {
		return nil, err
	}
	if p.terminal == nil {
		return nil, wrongState("process %q has no terminal", r.ProcessId)
	}
	if err := p.resize(r.Rows, r.Columns); err != nil {
		return nil, wrongState("%v", err)
	}
	return &agentv1.ResizeResponse{}, nil
}

// Signal implements agentv1.AgentServiceService.
func (s *Service) Signal(ctx context.Context, r *agentv1.SignalRequest) (*agentv1.SignalResponse, error) {
	if r.Signal < 1 || r.Signal > rawfork.LastSignal {
		return nil, invalid("signal %d is not 1 to %d", r.Signal, rawfork.LastSignal)
	}
	p, err := s.processes.get(ctx, r.ProcessId)
	if err != nil {
		return nil, err
	}
	sig := syscall.Signal(r.Signal)
	if r.All {
		if err := s.wall.signalAll(sig); err != nil && !errors.Is(err, unix.ESRCH) {
			return nil, internal("cannot signal every process: %v", err)
		}
		return &agentv1.SignalResponse{}, nil
	}
	switch err := s.wall.signal(p, sig); {
	case errors.Is(err, errEnded), errors.Is(err, unix.ESRCH):
		return nil, wrongState("process %q has ended", r.ProcessId)
	case err != nil:
		return nil, internal("cannot signal process %q: %v", r.ProcessId, err)
	}
	return &agentv1.SignalResponse{}, nil
}

// Wait implements agentv1.AgentServiceService.
func (s *Service) Wait(ctx context.Context, r *agentv1.WaitRequest) (*agentv1.WaitResponse, error) {
	ctx, cancel := longPoll(ctx, r.WaitMs)
	defer cancel()
	p, err := s.processes.get(ctx, r.ProcessId)
	if err != nil {
		return nil, err
	}
	if weaken.Without("tell how processes end") {
		return &agentv1.WaitResponse{Exited: true, Code: 1 << 30}, nil
	}
	if !p.wait(ctx) {
		return &agentv1.WaitResponse{}, nil
	}
	return &agentv1.WaitResponse{
		Exited: true, Code: int32(p.exit.code), Signal: int32(p.exit.signal), Time: timestamppb.New(p.exit.time), Error: p.exit.err,
	}, nil
}

// Release implements agentv1.AgentServiceService.
func (s *Service) Release(ctx context.Context, r *agentv1.ReleaseRequest) (*agentv1.ReleaseResponse, error) {
	if err := checkID(r.ProcessId); err != nil {
		return nil, err
	}
	if s.processes.release(r.ProcessId) == nil {
		return nil, notFound("process %q is not known", r.ProcessId)
	}
	p, err := s.processes.get(ctx, r.ProcessId)
	if err != nil {
		if ctx.Err() == nil {
			s.processes.retire(r.ProcessId) // it did not start, and shall not when it is asked for again
		}
		return nil, err
	}
	if !p.hasEnded() {
		return nil, wrongState("process %q still runs: end it first", r.ProcessId)
	}
	if s.processes.take(p) {
		p.release()
	}
	return &agentv1.ReleaseResponse{}, nil
}

func longPoll(ctx context.Context, waitMS uint32) (context.Context, context.CancelFunc) {
	return context.WithTimeout(ctx, min(time.Duration(waitMS)*time.Millisecond, maxWait))
}

func checkID(id string) error {
	if id == "" || len(id) > maxIDLen {
		return invalid("an id has 1 to %d bytes, not %d", maxIDLen, len(id))
	}
	return nil
}

// kernel is which kernel, and which boot of it, the agent runs on.
type kernel struct{ release, bootID string }

// thisKernel is constant in an agent's life.
var thisKernel = sync.OnceValues(func() (kernel, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return kernel{}, err
	}
	fd, err := unix.Open("/proc/sys/kernel/random/boot_id", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return kernel{}, fmt.Errorf("cannot open the kernel's boot id: %w", err)
	}
	defer unix.Close(fd)
	id := make([]byte, 64) // it has 36, and a line feed
	n, err := ignoringEINTR(func() (int, error) { return unix.Read(fd, id) })
	if err != nil {
		return kernel{}, fmt.Errorf("cannot read the kernel's boot id: %w", err)
	}
	return kernel{release: unix.ByteSliceToString(u.Release[:]), bootID: strings.TrimSpace(string(id[:n]))}, nil
})
