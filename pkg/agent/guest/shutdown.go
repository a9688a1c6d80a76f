package guest

import (
	"context"
	"errors"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

// goneInterval is how often a shutdown looks whether the last process has gone. Orphans that the agent did not start tell
// nobody else when they end.
const goneInterval = 2 * time.Millisecond

// Shutdown implements agentv1.AgentServiceService. Repeating it, with a shorter grace for instance, is fine.
func (s *Service) Shutdown(ctx context.Context, r *agentv1.ShutdownRequest) (*agentv1.ShutdownResponse, error) {
	grace := min(time.Duration(r.GraceMs)*time.Millisecond, maxGrace)
	s.processes.close()
	if grace > 0 && !s.endAll(ctx, unix.SIGTERM, grace) && ctx.Err() != nil {
		return nil, ctx.Err()
	}
	// What does not go in killWait goes with PID 1.
	s.endAll(ctx, unix.SIGKILL, killWait)
	s.wall.sync()
	s.overOnce.Do(func() { close(s.over) })
	return &agentv1.ShutdownResponse{}, nil
}

// endAll signals every process and reports whether all were gone within patience.
func (s *Service) endAll(ctx context.Context, sig unix.Signal, patience time.Duration) bool {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if err := s.wall.signalAll(sig); err != nil && !errors.Is(err, unix.ESRCH) {
		return false
	}
	tick := time.NewTicker(goneInterval)
	defer tick.Stop()
	for !s.wall.gone() {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return false
		}
	}
	return true
}
