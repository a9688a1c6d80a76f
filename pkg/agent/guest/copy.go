package guest

import (
	"context"
	"errors"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

type copyJob struct {
	Path string `json:"path"`
}

func (*copyJob) run(_, _ int) error { return errors.New("not yet") }

func (s *Service) Copy(ctx context.Context, r *agentv1.CopyRequest) (*agentv1.CopyResponse, error) {
	return nil, internal("not yet")
}
