package client

import (
	"context"
	"errors"
	"io"
	"time"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// removeTimeout bounds the removal of a workload whose caller has already gone.
const removeTimeout = time.Minute

// RunOptions say how Run runs.
type RunOptions struct {
	Stdio
	// Delete the workload when Run returns, however it does.
	Remove bool
	// Called when the process runs, with it and its workload, for signals and resizes.
	Started func(*sandboxdv1.Workload, *Process)
}

// Run creates a workload, attaches, starts it and waits for its end. No output is missed. Spec.Process.Stdin is set if
// there is a Stdin. When ctx is done Run returns; the workload goes on, unless Remove is set. Once the process has ended its
// exit is answered even with an error: that of the removal.
func (c *Client) Run(ctx context.Context, request *sandboxdv1.CreateWorkloadRequest, o RunOptions) (exit *sandboxdv1.ProcessExit, err error) {
	if o.Stdin != nil {
		if request.GetSpec().GetProcess() == nil {
			request.Spec.Process = &sandboxdv1.ProcessSpec{}
		}
		request.Spec.Process.Stdin = true
	}
	created, err := c.Workloads.CreateWorkload(ctx, request)
	if err != nil {
		return nil, err
	}
	id := created.GetWorkload().GetId()
	if o.Remove {
		defer func() { err = errors.Join(err, c.remove(ctx, id)) }()
	}
	if end := created.GetWorkload().GetStatus(); end.GetState() == sandboxdv1.WorkloadState_WORKLOAD_STATE_EXITED && Begun(created.GetWorkload()) {
		return &sandboxdv1.ProcessExit{Code: end.GetExitCode(), Signal: end.GetExitSignal()}, c.replay(ctx, id, o.Stdio)
	}
	p, err := c.Attach(ctx, &sandboxdv1.AttachStart{Id: id, FromStart: true}, o.Stdio)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	w := created.GetWorkload()
	if !Begun(w) {
		started, err := c.Workloads.StartWorkload(ctx, &sandboxdv1.StartWorkloadRequest{Id: id})
		if err != nil {
			return nil, err
		}
		w = started.GetWorkload()
	}
	if o.Started != nil {
		o.Started(w, p)
	}
	return p.Wait()
}

// replay writes the output of a workload that has ended.
func (c *Client) replay(ctx context.Context, id string, to Stdio) error {
	logs, err := c.Workloads.StreamLogs(ctx, &sandboxdv1.StreamLogsRequest{Id: id})
	for err == nil {
		var piece *sandboxdv1.StreamLogsResponse
		if piece, err = logs.Recv(); err != nil {
			break
		}
		w := to.Stdout
		if piece.GetStream() == sandboxdv1.OutputStream_OUTPUT_STREAM_STDERR {
			w = to.Stderr
		}
		if w != nil {
			_, err = w.Write(piece.GetData())
		}
	}
	if errors.Is(err, io.EOF) {
		return nil
	}
	return err
}

// Begun reports whether a workload that a creation was answered with has been started before: the creation had an idempotency
// key, and was a retry.
func Begun(w *sandboxdv1.Workload) bool {
	return w.GetStatus().GetState() > sandboxdv1.WorkloadState_WORKLOAD_STATE_CREATED
}

// remove also works when ctx has ended: that is when it matters most.
func (c *Client) remove(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	_, err := c.Workloads.DeleteWorkload(ctx, &sandboxdv1.DeleteWorkloadRequest{Id: id, Force: true})
	return err
}
