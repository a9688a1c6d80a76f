package main

import (
	"context"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// probeTimeout bounds the look at what the host can do; to see whether a guest boots takes longest.
const probeTimeout = 2 * time.Minute

// hostFacts finds out, once and in the background, what this host can give; the function it returns waits for the answer.
// ctx ends the look early, and the host then counts as unable.
func hostFacts(ctx context.Context, log *zap.Logger, runtimes map[spec.Isolation]runtime.Runtime) (facts func() policy.Host, wait func()) {
	hostname, err := os.Hostname()
	if err != nil {
		log.Warn("cannot read the host's name: rules on host.hostname see an empty one", zap.Error(err))
	}
	facts = sync.OnceValue(func() policy.Host {
		container := probe(ctx, log, spec.IsolationContainer, runtimes)
		vm := probe(ctx, log, spec.IsolationVM, runtimes)
		return policy.Host{
			Hostname:           hostname,
			ContainerAvailable: container.Available, ContainerReason: container.Reason,
			VMAvailable: vm.Available, VMReason: vm.Reason, VMAccelerator: vm.Accelerator,
		}
	})
	var wg sync.WaitGroup
	wg.Go(func() { facts() })
	return facts, wg.Wait
}

func probe(ctx context.Context, log *zap.Logger, i spec.Isolation, runtimes map[spec.Isolation]runtime.Runtime) runtime.Availability {
	prober, ok := runtimes[i].(runtime.Prober)
	if !ok {
		return runtime.Availability{Reason: "no runtime for it is built in"}
	}
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	a := prober.Probe(ctx)
	log.Info("isolation probed", zap.String("isolation", string(i)), zap.Bool("available", a.Available),
		zap.String("reason", a.Reason), zap.String("accelerator", a.Accelerator), zap.String("accelerator_reason", a.AcceleratorReason))
	return a
}
