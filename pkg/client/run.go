package client

import (
	"context"
	"errors"
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
	p, err := c.Attach(ctx, &sandboxdv1.AttachStart{Id: id, FromStart: true}, o.Stdio)
	if err != nil {
		return nil, err
	}
	defer p.Close()
	started, err := c.Workloads.StartWorkload(ctx, &sandboxdv1.StartWorkloadRequest{Id: id})
	if err != nil {
		return nil, err
	}
	if o.Started != nil {
		o.Started(started.GetWorkload(), p)
	}
	return p.Wait()
}

// remove also works when ctx has ended: that is when it matters most.
func (c *Client) remove(ctx context.Context, id string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
	defer cancel()
	_, err := c.Workloads.DeleteWorkload(ctx, &sandboxdv1.DeleteWorkloadRequest{Id: id, Force: true})
	return err
}
