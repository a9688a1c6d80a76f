package server

import (
	"errors"
	"fmt"

	"buf.build/go/protovalidate"
	"google.golang.org/protobuf/proto"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// validate checks a request against the rules written in its proto; the error names the first field at fault.
func (s *Server) validate(req any) error {
	m, ok := req.(proto.Message)
	if !ok {
		return spec.Errorf(spec.KindInternal, "a request of type %T is no proto message", req)
	}
	err := s.validator.Validate(m)
	var violated *protovalidate.ValidationError
	if errors.As(err, &violated) && len(violated.Violations) > 0 {
		v := violated.Violations[0].Proto
		field := protovalidate.FieldPathString(v.GetField())
		if field == "" {
			// A rule of the whole message, such as a oneof that must be set.
			field = string(m.ProtoReflect().Descriptor().Name())
		}
		return spec.Invalidf(field, "%s: %s", field, v.GetMessage())
	}
	if err != nil {
		return fmt.Errorf("cannot validate a %T: %w", req, err)
	}
	return nil
}
