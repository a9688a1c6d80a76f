package spec

import (
	"errors"
	"fmt"
)

// Kind is what went wrong, as far as a caller can act on it. pkg/server maps kinds to gRPC codes, and nothing else does.
type Kind int

const (
	// KindInternal is a fault of sandboxd or its host. The zero value: an error nobody classified.
	KindInternal Kind = iota
	KindNotFound
	KindAlreadyExists
	// KindInvalid: the request can never succeed as it is. Field names the field.
	KindInvalid
	// KindWrongState: not now; the message says which state it is in and which it needs.
	KindWrongState
	// KindDenied: the policy refuses. Rule names the rule.
	KindDenied
	// KindExhausted: a limit is reached.
	KindExhausted
	// KindUnavailable: try again later.
	KindUnavailable
	// KindUnsupported: this isolation, or this host, cannot do it.
	KindUnsupported
)

// Reasons that programs act on, beyond the kind.
const (
	// ReasonProcessNotFound: the command is not in the image. Exit code 127.
	ReasonProcessNotFound = "PROCESS_NOT_FOUND"
	// ReasonProcessNotExecutable: the command cannot be executed. Exit code 126.
	ReasonProcessNotExecutable = "PROCESS_NOT_EXECUTABLE"
	// ReasonPolicyDenied: Rule says which rule.
	ReasonPolicyDenied = "POLICY_DENIED"
	// ReasonUnsatisfiable: the policy demands what this host cannot give.
	ReasonUnsatisfiable = "UNSATISFIABLE"
)

// Error is an error with a kind. Its message is one plain sentence that ends with what to do next, where there is
// something to do.
type Error struct {
	Kind Kind
	// Machine-readable, in UPPER_SNAKE_CASE; empty unless a program may act on it.
	Reason string
	// The request's field at fault, for KindInvalid: spec.resources.memory_bytes.
	Field string
	// The policy's rule, for KindDenied.
	Rule string
	Err  error
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Errorf makes an error of a kind.
func Errorf(kind Kind, format string, args ...any) *Error {
	return &Error{Kind: kind, Err: fmt.Errorf(format, args...)}
}

// Invalidf says which field of a request is wrong, and how.
func Invalidf(field, format string, args ...any) *Error {
	return &Error{Kind: KindInvalid, Field: field, Err: fmt.Errorf(format, args...)}
}

// WithReason returns a copy of e that carries a machine-readable reason.
func (e *Error) WithReason(reason string) *Error {
	c := *e
	c.Reason = reason
	return &c
}

// KindOf is the kind of the first Error in err's chain, KindInternal if there is none.
func KindOf(err error) Kind {
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	return KindInternal
}

// ReasonOf is the reason of the first Error in err's chain.
func ReasonOf(err error) string {
	var e *Error
	if errors.As(err, &e) {
		return e.Reason
	}
	return ""
}
