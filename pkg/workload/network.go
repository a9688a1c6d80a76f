package workload

import (
	"context"
	"fmt"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// A workload is joined to its network when it starts and leaves it when its sandbox has ended, so that a stopped workload
// holds no address, and no plugin's work has to outlive the namespace it was done in. The next start joins anew.

// join joins a sandbox that was just started; nil for one that asks for no network. What was done when it fails, takeDown
// takes back.
func (e *entry) join(ctx context.Context, inst runtime.Instance, network string) (*spec.Network, error) {
	if !spec.Joins(network) {
		return nil, nil
	}
	n, ok := inst.(runtime.Networker)
	if !ok {
		return nil, spec.Errorf(spec.KindUnsupported, "cannot join network %q: a %s has no network but none", network, e.isolation())
	}
	netns, err := n.NetNS()
	if err != nil {
		return nil, err
	}
	defer netns.Close()
	joined, err := e.m.cfg.Networks.Attach(ctx, e.id, network, netns)
	if err != nil {
		return nil, err
	}
	if err := n.Connect(joined); err != nil {
		return nil, fmt.Errorf("cannot join network %q: %w", network, err)
	}
	return &joined, nil
}

// takeDown ends what may stand of the sandbox, keeps its writable layer, and then leaves the network: not before, for the
// address may be another's at once.
func (e *entry) takeDown(ctx context.Context) error {
	if err := e.runtime().Release(ctx, e.id); err != nil {
		return err
	}
	return e.m.cfg.Networks.Detach(ctx, e.id)
}
