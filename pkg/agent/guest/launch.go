package guest

import (
	"context"

	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

// launchAtBoot does what a boot message says and encodes how it went.
func (s *Service) launchAtBoot(encoded []byte) []byte {
	result, err := s.doLaunch(encoded)
	if err != nil {
		refusal := status.Convert(err)
		result = &agentv1.LaunchResult{Code: uint32(refusal.Code()), Message: refusal.Message()}
	}
	b, err := proto.Marshal(result)
	if err != nil {
		return nil // the daemon sees a result without a process
	}
	return b
}

func (s *Service) doLaunch(encoded []byte) (*agentv1.LaunchResult, error) {
	l := &agentv1.Launch{}
	if err := proto.Unmarshal(encoded, l); err != nil {
		return nil, invalid("cannot decode what to launch: %v", err)
	}
	if l.Configure == nil || l.Container == nil {
		return nil, invalid("a launch needs a configuration and a container")
	}
	ctx := context.Background() // nothing of it waits for the daemon
	configured, err := s.Configure(ctx, l.Configure)
	if err != nil {
		return nil, err
	}
	config, err := s.createContainer(l.Container)
	if err != nil {
		return nil, err
	}
	if config.Process == nil {
		return nil, invalid("the container has no process")
	}
	process, err := s.exec(ctx, l.Container.ContainerId, l.ProcessId, config.Process, wiring{stdin: l.Stdin})
	if err != nil {
		return nil, err
	}
	return &agentv1.LaunchResult{Configure: configured, Process: process}, nil
}

// warmUp has the decoders of JSON and protobuf look at the types that a launch will bring, which takes them longer than the
// launch's own bytes do. It is done while the daemon makes the root, and on the thread that then waits for it: another
// would have to be made first, and take its processor time from whoever makes the root.
func warmUp() {
	defer phase("warm up")()
	_, _ = decodeSpec([]byte("{}"))
	_, _ = thisKernel() // remembers a failure
	sample := &agentv1.Launch{
		Configure: &agentv1.ConfigureRequest{Hostname: "h"},
		Container: &agentv1.CreateContainerRequest{ContainerId: "c"},
	}
	if b, err := proto.Marshal(sample); err == nil {
		_ = proto.Unmarshal(b, sample)
	}
	_, _ = proto.Marshal(&agentv1.LaunchResult{Configure: &agentv1.ConfigureResponse{AgentVersion: "v"}, Process: &agentv1.ExecResponse{Pid: 1}})
}
