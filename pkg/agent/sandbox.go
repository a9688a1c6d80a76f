package agent

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"fmt"
	"time"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/types/known/timestamppb"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// entropyBytes is what a guest kernel's random generator is given: twice its state.
	entropyBytes = 64
	// shutdownMargin is what a shutdown may take beyond its grace: killing, and writing the disk back.
	shutdownMargin = 30 * time.Second
)

// Configure gives the sandbox its identity: host name, this moment's time, fresh entropy, and the network it was joined to, nil
// for none. It comes before everything else.
func (c *Client) Configure(ctx context.Context, hostname string, n *spec.Network) (spec.Claims, error) {
	return c.configure(ctx, hostname, "", n)
}

func (c *Client) configure(ctx context.Context, hostname, machineID string, n *spec.Network) (spec.Claims, error) {
	joined, err := networkMessage(n)
	if err != nil {
		return spec.Claims{}, err
	}
	var claims spec.Claims
	var took time.Duration
	ownClock := false
	err = c.call(ctx, callLimit, func(ctx context.Context, agent agentv1.AgentServiceService) error {
		began := time.Now()
		request := configureRequest(hostname, joined)
		request.MachineId = machineID
		r, err := agent.Configure(ctx, request)
		if err != nil {
			return err
		}
		took, ownClock = time.Since(began), r.OwnClock
		claims, err = configured(r)
		return err
	})
	if err == nil && ownClock {
		err = c.settleClock(ctx, took)
	}
	return claims, err
}

// A guest's clock was set to the time at which that was asked for, and is behind by at most the time until the answer: much,
// for a guest fresh from a template, whose first answers come late. So it is compared, and moved by the difference.
const (
	clockError    = 4 * time.Millisecond
	clockAttempts = 8
)

// settleClock puts a guest's clock right within clockError, or as near as a busy host allows, where took is how long setting
// it did.
func (c *Client) settleClock(ctx context.Context, took time.Duration) error {
	if took <= clockError {
		return nil
	}
	var ahead, best time.Duration
	for n := range clockAttempts {
		at, took, err := c.adjustClock(ctx, 0)
		if err != nil {
			return err
		}
		if n == 0 || took < best {
			ahead, best = at, took
		}
		if best <= clockError {
			break
		}
	}
	_, _, err := c.adjustClock(ctx, -ahead)
	return err
}

// adjustClock moves a guest's clock. It answers how far that is then ahead of the host's, within half of the time that it took.
func (c *Client) adjustClock(ctx context.Context, by time.Duration) (ahead, took time.Duration, err error) {
	err = c.call(ctx, callLimit, func(ctx context.Context, agent agentv1.AgentServiceService) error {
		began := time.Now()
		r, err := agent.AdjustClock(ctx, &agentv1.AdjustClockRequest{By: int64(by)})
		if err != nil {
			return err
		}
		took = time.Since(began)
		ahead = r.Now.AsTime().Sub(began.Add(took / 2))
		return nil
	})
	return ahead, took, err
}

// configureRequest is made anew for each attempt: time and entropy are fresh.
func configureRequest(hostname string, n *agentv1.Network) *agentv1.ConfigureRequest {
	entropy := make([]byte, entropyBytes)
	rand.Read(entropy) // never fails
	return &agentv1.ConfigureRequest{
		ProtocolVersion: spec.ProtocolVersion, Hostname: hostname, Now: timestamppb.Now(), Entropy: entropy, Network: n,
	}
}

func configured(r *agentv1.ConfigureResponse) (spec.Claims, error) {
	if v := r.GetProtocolVersion(); v != spec.ProtocolVersion {
		return spec.Claims{}, protocolError("version %d", v)
	}
	return spec.Claims{
		AgentVersion: text(r.AgentVersion, maxName), KernelRelease: text(r.KernelRelease, maxName), BootID: text(r.BootId, maxName),
	}, nil
}

// Container is what a sandbox is to hold.
type Container struct {
	ID     string
	Config *specs.Spec
	// What oci.CompileSeccomp made of the config's linux.seccomp, which is not sent, and, for the agent itself, what
	// oci.CompileAgentSeccomp did.
	Filter, AgentFilter []byte
}

func (c Container) request() (*agentv1.CreateContainerRequest, error) {
	sent := *c.Config
	if c.Config.Linux != nil {
		linux := *c.Config.Linux
		linux.Seccomp = nil
		sent.Linux = &linux
	}
	encoded, err := json.Marshal(&sent)
	if err != nil {
		return nil, fmt.Errorf("cannot encode the container's configuration: %w", err)
	}
	return &agentv1.CreateContainerRequest{
		ContainerId: c.ID, OciConfig: encoded, SeccompFilter: c.Filter, AgentFilter: c.AgentFilter,
	}, nil
}

// CreateContainer has the root, mounts and masks of the container's config made.
func (c *Client) CreateContainer(ctx context.Context, container Container) error {
	request, err := container.request()
	if err != nil {
		return err
	}
	return c.call(ctx, callLimit, func(ctx context.Context, agent agentv1.AgentServiceService) error {
		_, err := agent.CreateContainer(ctx, request)
		return err
	})
}

// startedPID is the process that an agent says it has started.
func startedPID(r *agentv1.ExecResponse) (int, error) {
	if f := r.GetFailure(); f != nil {
		return 0, startFailure(f)
	}
	return pidOf(r.GetPid())
}

// Start starts a process. An error of which spec.ReasonOf is ReasonProcessNotFound or ReasonProcessNotExecutable means 127
// or 126. Starting an id again that already runs answers with that process. After any other error, ctx's end included, the
// process is ended should it run, and its id is never started again.
func (c *Client) Start(ctx context.Context, containerID, processID string, p *specs.Process, stdin bool) (*Process, error) {
	started, _, err := c.start(ctx, containerID, processID, p, stdin, false)
	return started, err
}

// start starts a process, with output that was handed over if handed says so. It answers whether the process has that.
func (c *Client) start(ctx context.Context, containerID, processID string, p *specs.Process, stdin, handed bool) (*Process, bool, error) {
	encoded, err := json.Marshal(p)
	if err != nil {
		return nil, false, fmt.Errorf("cannot encode the process: %w", err)
	}
	started := c.Process(processID)
	took := false
	refused := false
	err = c.call(ctx, callLimit, func(ctx context.Context, agent agentv1.AgentServiceService) error {
		r, err := agent.Exec(ctx, &agentv1.ExecRequest{
			ContainerId: containerID, ProcessId: processID, OciProcess: encoded, Stdin: stdin, HandedOutput: handed,
		})
		if err != nil {
			return err
		}
		refused = r.Failure != nil
		took = handed && r.HandedOutput
		started.PID, err = startedPID(r)
		return err
	})
	if err != nil {
		if !refused {
			c.abandon(started)
		}
		return nil, false, err
	}
	return started, took, nil
}

// Process is a process that was started before, by this client or an earlier daemon's.
func (c *Client) Process(id string) *Process { return &Process{ID: id, client: c} }

// Freeze holds every process of a guest's workload still, or lets them go on; the agent goes on. What it answers is a claim: who
// does not hold still harms only itself.
func (c *Client) Freeze(ctx context.Context, frozen bool) error {
	return c.call(ctx, callLimit, func(ctx context.Context, agent agentv1.AgentServiceService) error {
		_, err := agent.Freeze(ctx, &agentv1.FreezeRequest{Frozen: frozen})
		return err
	})
}

// Rename is Configure for a guest that goes on from a snapshot, whose files that say who it is are written anew. machineID is
// what machine-id(5) says.
func (c *Client) Rename(ctx context.Context, hostname, machineID string) (spec.Claims, error) {
	return c.configure(ctx, hostname, machineID, nil)
}

// Retain kills and forgets every process and copy but the one named: what callers of an earlier daemon left.
func (c *Client) Retain(ctx context.Context, processID string) error {
	return c.call(ctx, callLimit, func(ctx context.Context, agent agentv1.AgentServiceService) error {
		_, err := agent.Retain(ctx, &agentv1.RetainRequest{ProcessIds: []string{processID}})
		return err
	})
}

// Stats are what the sandbox's own kernel counts.
func (c *Client) Stats(ctx context.Context) (spec.Claims, error) {
	var claims spec.Claims
	err := c.call(ctx, callLimit, func(ctx context.Context, agent agentv1.AgentServiceService) error {
		r, err := agent.Stats(ctx, &agentv1.StatsRequest{})
		if err != nil {
			return err
		}
		claims = spec.Claims{
			MemoryTotalBytes: r.MemoryTotalBytes, MemoryAvailableBytes: r.MemoryAvailableBytes, MemoryCacheBytes: r.MemoryCacheBytes,
			OOMKills: r.OomKills,
		}
		return nil
	})
	return claims, err
}

// Shutdown ends every process, SIGTERM first if there is a grace, and then the sandbox. It is no error if the sandbox has
// ended before it could answer.
func (c *Client) Shutdown(ctx context.Context, grace time.Duration) error {
	err := c.call(ctx, grace+shutdownMargin, func(ctx context.Context, agent agentv1.AgentServiceService) error {
		_, err := agent.Shutdown(ctx, &agentv1.ShutdownRequest{GraceMs: uint32(grace.Milliseconds())})
		return err
	})
	select {
	case <-c.done:
		return nil
	default:
		return err
	}
}
