package guest

import (
	"context"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

// Launch implements agentv1.AgentServiceService. Whatever of it was done before a connection was lost is not done again when it
// is repeated.
func (s *Service) Launch(ctx context.Context, r *agentv1.LaunchRequest) (*agentv1.LaunchResponse, error) {
	if r.Configure == nil || r.Container == nil {
		return nil, invalid("a launch needs a configuration and a container")
	}
	configured, err := s.Configure(ctx, r.Configure)
	if err != nil {
		return nil, err
	}
	config, err := s.createContainer(r.Container)
	if err != nil {
		return nil, err
	}
	if config.Process == nil {
		return nil, invalid("the container has no process")
	}
	process, err := s.exec(ctx, r.Container.ContainerId, r.ProcessId, config.Process, r.Stdin)
	if err != nil {
		return nil, err
	}
	return &agentv1.LaunchResponse{Configure: configured, Process: process}, nil
}

// warmUp has the decoders of JSON and protobuf look at the types that a launch will bring, which takes them longer than the
// launch's own bytes do. It runs while the daemon makes the root.
func warmUp() {
	defer phase("warm up")()
	_ = decodeConfig([]byte("{}"), &specs.Spec{})
	sample := &agentv1.LaunchRequest{
		Configure: &agentv1.ConfigureRequest{Hostname: "h"},
		Container: &agentv1.CreateContainerRequest{ContainerId: "c"},
	}
	if b, err := proto.Marshal(sample); err == nil {
		_ = proto.Unmarshal(b, sample)
	}
	_, _ = proto.Marshal(&agentv1.LaunchResponse{Configure: &agentv1.ConfigureResponse{AgentVersion: "v"}, Process: &agentv1.ExecResponse{Pid: 1}})
}
