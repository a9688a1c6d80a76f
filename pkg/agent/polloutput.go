package agent

import (
	"context"
	"time"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
)

// PollOutput is ReadOutput for those who take no for an answer: without chunks and eof the agent has said that nothing came
// within wait, at most 30 s. An agent that is slow to answer has not said so.
func (p *Process) PollOutput(ctx context.Context, offset uint64, wait time.Duration) (chunks []Chunk, eof bool, err error) {
	wait = min(wait, pollTime)
	err = p.client.call(ctx, wait+pollMargin, func(ctx context.Context, agent agentv1.AgentServiceService) error {
		r, err := agent.ReadOutput(ctx, &agentv1.ReadOutputRequest{
			ProcessId: p.ID, Offset: offset, MaxBytes: readBytes, WaitMs: uint32(wait.Milliseconds()),
		})
		if err != nil {
			return err
		}
		chunks, eof, err = chunksOf(r, readBytes)
		return err
	})
	if err != nil {
		return nil, false, err
	}
	return chunks, eof, nil
}
