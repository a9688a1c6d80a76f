package main

import (
	"context"
	"testing"

	"go.uber.org/zap/zaptest"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

type fakeRuntime struct {
	runtime.Runtime
	answers []bool
	probes  int
}

func (f *fakeRuntime) Probe(context.Context) runtime.Availability {
	answer := f.answers[min(f.probes, len(f.answers)-1)]
	f.probes++
	return runtime.Availability{Available: answer, Reason: "because", Accelerator: "tcg"}
}

// A yes stands; a no is not asked for again at once, and is when some time has passed.
func TestHostFacts(t *testing.T) {
	container, vm := &fakeRuntime{answers: []bool{true, false}}, &fakeRuntime{answers: []bool{false, true}}
	h := newHostFacts(t.Context(), zaptest.NewLogger(t), map[spec.Isolation]runtime.Runtime{
		spec.IsolationContainer: container, spec.IsolationVM: vm,
	})
	for range 3 {
		f := h.facts()
		if !f.ContainerAvailable || f.VMAvailable || f.VMReason != "because" || f.VMAccelerator != "tcg" || f.Hostname == "" {
			t.Fatalf("%+v", f)
		}
	}
	if container.probes != 1 || vm.probes != 1 {
		t.Errorf("probed %d and %d times, want once each", container.probes, vm.probes)
	}
	w := h.walls[spec.IsolationVM]
	w.asked = w.asked.Add(-probeAgain)
	if f := h.facts(); !f.VMAvailable || vm.probes != 2 || container.probes != 1 {
		t.Errorf("%+v after a while, probed %d and %d times", f, container.probes, vm.probes)
	}
}

func TestHostWithoutARuntime(t *testing.T) {
	f := newHostFacts(t.Context(), zaptest.NewLogger(t), nil).facts()
	if f.ContainerAvailable || f.VMAvailable || f.ContainerReason == "" || f.VMReason == "" {
		t.Errorf("%+v", f)
	}
}
