package agent

import (
	"errors"
	"fmt"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// maxMessage bounds an agent's error message, in bytes.
const maxMessage = 1024

// refused is the agent's answer to a call that it got and did not do; nil if err means that no answer came.
func refused(err error) error {
	var own *spec.Error
	if errors.As(err, &own) {
		return err // found in the answer by this package
	}
	answer, ok := status.FromError(err)
	if !ok || isContext(err) {
		return nil
	}
	kind := spec.KindInternal
	switch answer.Code() {
	case codes.NotFound:
		kind = spec.KindNotFound
	case codes.InvalidArgument:
		kind = spec.KindInvalid
	case codes.FailedPrecondition:
		kind = spec.KindWrongState
	case codes.ResourceExhausted:
		kind = spec.KindExhausted
	case codes.Unimplemented:
		kind = spec.KindUnsupported
	case codes.Canceled, codes.DeadlineExceeded:
		return nil // the attempt's own end, told by the other side first
	}
	return spec.Errorf(kind, "%s", text(answer.Message(), maxMessage))
}

// protocolError is for an answer that no agent of ours gives.
func protocolError(format string, args ...any) error {
	return spec.Errorf(spec.KindInternal, "the sandbox's agent broke the protocol: %w", fmt.Errorf(format, args...))
}

// startFailure says why a process did not start.
func startFailure(f *agentv1.ExecFailure) error {
	message := text(f.Message, maxMessage)
	if message == "" {
		message = "cannot start the process"
	}
	switch f.Reason {
	case agentv1.ExecFailure_REASON_NOT_FOUND:
		return spec.Invalidf("process.command", "%s", message).WithReason(spec.ReasonProcessNotFound)
	case agentv1.ExecFailure_REASON_NOT_EXECUTABLE:
		return spec.Invalidf("process.command", "%s", message).WithReason(spec.ReasonProcessNotExecutable)
	case agentv1.ExecFailure_REASON_BAD_USER:
		return spec.Invalidf("process.user", "%s", message)
	case agentv1.ExecFailure_REASON_BAD_WORKDIR:
		return spec.Invalidf("process.working_dir", "%s", message)
	default:
		return spec.Errorf(spec.KindInternal, "cannot confine the process: %s", message)
	}
}
