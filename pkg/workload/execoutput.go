package workload

import (
	"context"
	"time"

	"github.com/sandboxd/sandboxd/pkg/agent"
)

// lingerLimit is how long output may stay silent, after the process that was exec'd has ended, before it is no longer
// waited for: a descendant may hold it open for ever. What the process wrote itself is long with the agent by then.
const lingerLimit = 5 * time.Second

func newExecSession(e *entry, r *run, proc *agent.Process, command string) *execSession {
	s := &execSession{e: e, r: r, proc: proc, command: command, linger: lingerLimit}
	s.running, s.ends = context.WithCancel(context.Background())
	return s
}

// read answers with the output from offset on. It is at its end too (eof) when the process has ended and the agent says
// that nobody wrote for s.linger since. That must be its answer: one that takes long, on a busy host or from a guest that
// is emulated, may yet bring what the process wrote last.
func (s *execSession) read(ctx context.Context, offset uint64) ([]agent.Chunk, bool, error) {
	if s.running.Err() == nil {
		waiting, cancel := context.WithCancel(ctx)
		defer cancel()
		stop := context.AfterFunc(s.running, cancel)
		defer stop()
		chunks, eof, err := s.proc.ReadOutput(waiting, offset)
		if waiting.Err() == nil || ctx.Err() != nil || err == nil {
			return chunks, eof, err
		}
		// Given up because the process has ended. What it would have brought is still at the agent.
	}
	chunks, eof, err := s.proc.PollOutput(ctx, offset, s.linger)
	return chunks, eof || err == nil && len(chunks) == 0, err
}
