package agent

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// ErrTooLarge: what is to be launched does not fit into a boot message. Call Configure, CreateContainer and Start instead.
var ErrTooLarge = errors.New("too large for a boot message")

// Launch is what an agent can be told with its boot message, where the runtime has one (runtime.Launcher): to do Configure, of a
// sandbox without a network, CreateContainer and Start of the config's own process.
type Launch struct {
	Container Container
	ProcessID string
	// Whether its standard input will be written to.
	Stdin bool
}

// Encode answers with ErrTooLarge for more than spec.MaxLaunchBytes.
func (l Launch) Encode() ([]byte, error) {
	container, err := l.Container.request()
	if err != nil {
		return nil, err
	}
	b, err := proto.Marshal(&agentv1.Launch{
		Configure: configureRequest(l.Container.Config.Hostname, nil), Container: container, ProcessId: l.ProcessID, Stdin: l.Stdin,
	})
	if err != nil {
		return nil, fmt.Errorf("cannot encode what to launch: %w", err)
	}
	if len(b) > spec.MaxLaunchBytes {
		return nil, ErrTooLarge
	}
	return b, nil
}

// Launched reads what the agent answered to a Launch: the errors are those of the three calls. The process runs, so the answer is
// a claim; it has at most spec.MaxLaunchBytes.
func (c *Client) Launched(l Launch, answer []byte) (spec.Claims, *Process, error) {
	r := &agentv1.LaunchResult{}
	if len(answer) > spec.MaxLaunchBytes {
		return spec.Claims{}, nil, protocolError("%d bytes about a launch", len(answer))
	}
	if err := proto.Unmarshal(answer, r); err != nil {
		return spec.Claims{}, nil, protocolError("cannot decode how a launch went: %w", err)
	}
	if r.Code != 0 {
		err := status.Error(codes.Code(r.Code), r.Message)
		if refusal := refused(err); refusal != nil {
			err = refusal
		}
		return spec.Claims{}, nil, err
	}
	claims, err := configured(r.Configure)
	if err != nil {
		return spec.Claims{}, nil, err
	}
	started := c.Process(l.ProcessID)
	started.early = c.takeExpected()
	if started.PID, err = startedPID(r.Process); err != nil {
		return spec.Claims{}, nil, err
	}
	return claims, started, nil
}
