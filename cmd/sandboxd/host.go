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

const (
	// probeTimeout bounds the look at what the host can do: longer than the longest --vm-kvm-trial.
	probeTimeout = 11 * time.Minute
	// probeAgain is how long a no stands before it is looked at again: whoever installs what was missing need not
	// restart the daemon. A yes stands as long as the daemon.
	probeAgain = 10 * time.Second
)

// hostFacts knows what this host can give. The manager asks it at each decision.
type hostFacts struct {
	ctx      context.Context
	log      *zap.Logger
	hostname string
	walls    map[spec.Isolation]*wallFacts
}

type wallFacts struct {
	runtime runtime.Runtime

	mu    sync.Mutex // held while probing, so that everybody waits for one answer
	last  runtime.Availability
	asked time.Time
}

// newHostFacts: when ctx is done no further look is taken, and the host counts as unable.
func newHostFacts(ctx context.Context, log *zap.Logger, runtimes map[spec.Isolation]runtime.Runtime) *hostFacts {
	hostname, err := os.Hostname()
	if err != nil {
		log.Warn("cannot read the host's name: rules on host.hostname see an empty one", zap.Error(err))
	}
	h := &hostFacts{ctx: ctx, log: log, hostname: hostname, walls: make(map[spec.Isolation]*wallFacts)}
	for isolation, r := range runtimes {
		h.walls[isolation] = &wallFacts{runtime: r}
	}
	return h
}

func (h *hostFacts) facts() policy.Host {
	container, vm := h.availability(spec.IsolationContainer), h.availability(spec.IsolationVM)
	return policy.Host{
		Hostname:           h.hostname,
		ContainerAvailable: container.Available, ContainerReason: container.Reason,
		VMAvailable: vm.Available, VMReason: vm.Reason, VMAccelerator: vm.Accelerator,
	}
}

func (h *hostFacts) availability(i spec.Isolation) runtime.Availability {
	w := h.walls[i]
	if w == nil {
		return runtime.Availability{Reason: "no runtime for it is built in"}
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.last.Available || (!w.asked.IsZero() && time.Since(w.asked) < probeAgain) {
		return w.last
	}
	prober, ok := w.runtime.(runtime.Prober)
	if !ok {
		w.last = runtime.Availability{Available: true, Reason: "it needs nothing of the host"}
		return w.last
	}
	ctx, cancel := context.WithTimeout(h.ctx, probeTimeout)
	defer cancel()
	w.last, w.asked = prober.Probe(ctx), time.Now()
	h.log.Info("isolation probed", zap.String("isolation", string(i)), zap.Bool("available", w.last.Available),
		zap.String("reason", w.last.Reason), zap.String("accelerator", w.last.Accelerator),
		zap.String("accelerator_reason", w.last.AcceleratorReason))
	return w.last
}
