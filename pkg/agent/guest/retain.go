package guest

import (
	"context"
	"errors"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

// Retain implements agentv1.AgentServiceService.
func (s *Service) Retain(ctx context.Context, r *agentv1.RetainRequest) (*agentv1.RetainResponse, error) {
	for _, p := range s.processes.others(r.ProcessIds) {
		if err := s.discard(ctx, p); err != nil {
			return nil, err
		}
	}
	return &agentv1.RetainResponse{}, nil
}

// discard kills a process, waits for its end and forgets it.
func (s *Service) discard(ctx context.Context, p *process) error {
	if err := p.started.wait(ctx); err != nil {
		return ctx.Err() // one that did not start has no row any more
	}
	switch err := s.wall.signal(p, unix.SIGKILL); {
	case err == nil, errors.Is(err, errEnded), errors.Is(err, unix.ESRCH):
	default:
		return internal("cannot kill process %q: %v", p.id, err)
	}
	if !p.wait(ctx) {
		return ctx.Err()
	}
	if s.processes.take(p) {
		p.release()
	}
	return nil
}
