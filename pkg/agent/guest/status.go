package guest

import (
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// What the agent answers when it refuses. pkg/agent turns the codes into kinds.

func notFound(format string, args ...any) error {
	return status.Errorf(codes.NotFound, format, args...)
}

func invalid(format string, args ...any) error {
	return status.Errorf(codes.InvalidArgument, format, args...)
}

func wrongState(format string, args ...any) error {
	return status.Errorf(codes.FailedPrecondition, format, args...)
}

func exhausted(format string, args ...any) error {
	return status.Errorf(codes.ResourceExhausted, format, args...)
}

func internal(format string, args ...any) error {
	return status.Errorf(codes.Internal, format, args...)
}
