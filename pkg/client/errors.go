package client

import (
	"context"
	"errors"
	"io"
	"strings"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// errorDomain is the domain of sandboxd's own google.rpc.ErrorInfo.
const errorDomain = "sandboxd"

// Reasons that programs act on, as Error.Reason has them. The daemon may send others.
const (
	// ReasonProcessNotFound: the command is not in the image. A shell would exit with 127.
	ReasonProcessNotFound = "PROCESS_NOT_FOUND"
	// ReasonProcessNotExecutable: the command cannot be executed. A shell would exit with 126.
	ReasonProcessNotExecutable = "PROCESS_NOT_EXECUTABLE"
	// ReasonPolicyDenied: the policy refuses; Error.Rule says which rule.
	ReasonPolicyDenied = "POLICY_DENIED"
	// ReasonUnsatisfiable: the policy demands what the host cannot give.
	ReasonUnsatisfiable = "UNSATISFIABLE"
	// ReasonStopping: the daemon stopped during the call; workloads go on running.
	ReasonStopping = "DAEMON_STOPPING"
	// ReasonForbidden: none of the caller's roles allows it; Error.Rule says which role and which of its keys.
	ReasonForbidden = "FORBIDDEN"
	// ReasonUnreachable: no daemon answers at the address. Made by this package, never sent.
	ReasonUnreachable = "UNREACHABLE"
)

// Error is what a call returns when the daemon refused it or could not be reached.
type Error struct {
	Code codes.Code
	// Machine-readable; one of the constants above, or another of the daemon's.
	Reason string
	// One plain sentence.
	Message string
	// The policy's rule that refused, if one did.
	Rule string
	// The field of the request at fault, if one is.
	Field string

	status *status.Status
}

func (e *Error) Error() string { return e.Message }

// GRPCStatus lets status.FromError and status.Code see the original.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// ErrorReason is the reason of the first Error in err's chain, empty if there is none.
func ErrorReason(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return ""
}

// errorWrapper turns the statuses of calls into Errors.
type errorWrapper struct{ address string }

func (w *errorWrapper) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return w.wrap(invoke(ctx, method, req, reply, cc, opts...))
}

func (w *errorWrapper) stream(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	s, err := open(ctx, desc, cc, method, opts...)
	if err != nil {
		return nil, w.wrap(err)
	}
	return &errorStream{ClientStream: s, wrapper: w}, nil
}

type errorStream struct {
	grpc.ClientStream
	wrapper *errorWrapper
}

func (s *errorStream) RecvMsg(m any) error { return s.wrapper.wrap(s.ClientStream.RecvMsg(m)) }
func (s *errorStream) SendMsg(m any) error { return s.wrapper.wrap(s.ClientStream.SendMsg(m)) }
func (s *errorStream) CloseSend() error    { return s.wrapper.wrap(s.ClientStream.CloseSend()) }

func (w *errorWrapper) wrap(err error) error {
	// The end of a stream is told by io.EOF itself.
	if err == nil || err == io.EOF { //nolint:errorlint // gRPC returns it unwrapped, and only so is it the end.
		return err
	}
	s, ok := status.FromError(err)
	if !ok {
		return err
	}
	e := &Error{Code: s.Code(), Message: s.Message(), status: s}
	for _, detail := range s.Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok && info.GetDomain() == errorDomain {
			e.Reason = info.GetReason()
			e.Rule = info.GetMetadata()["rule"]
			e.Field = info.GetMetadata()["field"]
		}
	}
	if e.Reason == "" && e.Code == codes.Unavailable {
		e.Reason = ReasonUnreachable
		e.Message = w.unreachable(s.Message())
	}
	return e
}

// unreachable is what a person needs to know instead of gRPC's account of its connection attempts.
func (w *errorWrapper) unreachable(message string) string {
	const prefix = "cannot reach sandboxd at "
	switch {
	case strings.Contains(message, "permission denied"):
		return prefix + w.address + ": permission denied: run this as root or as a member of the socket's group"
	case strings.Contains(message, "x509:"), strings.Contains(message, "tls:"):
		return prefix + w.address + ": no trust (" + message + "): the daemon's certificate must be of --tls-ca's authority, and this client's of one the daemon knows"
	case strings.Contains(message, "no such file"), strings.Contains(message, "connection refused"):
		return prefix + w.address + ": nobody listens there: start sandboxd (systemctl start sandboxd), or name its socket with --address or SANDBOXD_ADDRESS"
	}
	return prefix + w.address + ": the connection was lost (" + message + "): is sandboxd still running?"
}
