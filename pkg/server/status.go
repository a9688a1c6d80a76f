package server

import (
	"context"
	"errors"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/protoadapt"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// ErrorDomain is the domain of every google.rpc.ErrorInfo of this API.
const ErrorDomain = "sandboxd"

// Reasons of errors that are born in this package.
const (
	// reasonStopping: the daemon ends the call because it stops; workloads go on.
	reasonStopping = "DAEMON_STOPPING"
	// reasonForbidden: the access table does not let this caller use this method.
	reasonForbidden = "FORBIDDEN"
)

// errStopping is the cause of contexts that end because the daemon stops.
var errStopping = spec.Errorf(spec.KindUnavailable, "sandboxd is stopping; workloads go on running: try again when it is back").WithReason(reasonStopping)

// kinds says how each kind of error looks to a client: the gRPC code, and the ErrorInfo reason when the error has none
// of its own. No other file chooses a code.
var kinds = map[spec.Kind]struct {
	code   codes.Code
	reason string
}{
	spec.KindInternal:      {codes.Internal, "INTERNAL"},
	spec.KindNotFound:      {codes.NotFound, "NOT_FOUND"},
	spec.KindAlreadyExists: {codes.AlreadyExists, "ALREADY_EXISTS"},
	spec.KindInvalid:       {codes.InvalidArgument, "INVALID"},
	spec.KindWrongState:    {codes.FailedPrecondition, "WRONG_STATE"},
	spec.KindDenied:        {codes.PermissionDenied, "DENIED"},
	spec.KindExhausted:     {codes.ResourceExhausted, "EXHAUSTED"},
	spec.KindUnavailable:   {codes.Unavailable, "UNAVAILABLE"},
	spec.KindUnsupported:   {codes.Unimplemented, "UNSUPPORTED"},
}

// toStatus turns what a handler returned into what its client gets. ctx is the call's: an error that only says that the
// context ended is told by the context's cause.
func toStatus(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if isContextError(err) && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	var e *spec.Error
	if errors.As(err, &e) {
		return kindStatus(e, err)
	}
	if s, ok := status.FromError(err); ok {
		return s.Err()
	}
	switch {
	case errors.Is(err, context.Canceled) && ctx.Err() != nil:
		return withInfo(codes.Canceled, "the caller went away", "CANCELED", nil)
	case errors.Is(err, context.DeadlineExceeded) && ctx.Err() != nil:
		return withInfo(codes.DeadlineExceeded, "the caller's deadline has passed", "DEADLINE_EXCEEDED", nil)
	}
	// Also a wait of the daemon's own that ran out: a fault of this side, not the caller's deadline.
	return withInfo(codes.Internal, err.Error(), kinds[spec.KindInternal].reason, nil)
}

func isContextError(err error) bool {
	return errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) ||
		status.Code(err) == codes.Canceled || status.Code(err) == codes.DeadlineExceeded
}

// kindStatus is the status of e; the message is that of the whole chain.
func kindStatus(e *spec.Error, chain error) error {
	row, ok := kinds[e.Kind]
	if !ok {
		row = kinds[spec.KindInternal]
	}
	reason := e.Reason
	if reason == "" {
		reason = row.reason
	}
	metadata := make(map[string]string)
	var more []protoadapt.MessageV1
	if e.Rule != "" {
		metadata["rule"] = validUTF8(e.Rule)
	}
	if e.Field != "" {
		metadata["field"] = validUTF8(e.Field)
		more = append(more, badRequest(validUTF8(e.Field), validUTF8(e.Error())))
	}
	return withInfo(row.code, chain.Error(), reason, metadata, more...)
}

func badRequest(field, description string) *errdetails.BadRequest {
	return &errdetails.BadRequest{FieldViolations: []*errdetails.BadRequest_FieldViolation{
		{Field: field, Description: description},
	}}
}

func withInfo(code codes.Code, message, reason string, metadata map[string]string, more ...protoadapt.MessageV1) error {
	message = validUTF8(message)
	details := append([]protoadapt.MessageV1{&errdetails.ErrorInfo{
		Reason: reason, Domain: ErrorDomain, Metadata: metadata,
	}}, more...)
	plain := status.New(code, message)
	// WithDetails fails only for code OK or a message that cannot be marshalled: a bare status still tells the kind.
	if full, err := plain.WithDetails(details...); err == nil {
		return full.Err()
	}
	return plain.Err()
}

func codeOf(answer error) codes.Code { return status.Code(answer) }

// isFault reports whether an answer means that something is wrong on this side.
func isFault(answer error) bool {
	return codeOf(answer) == codes.Internal || codeOf(answer) == codes.Unknown
}
