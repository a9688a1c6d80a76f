package server

import (
	"context"
	"fmt"
	goruntime "runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// probeTimeout bounds a runtime's look at the host: longer than an operator may give the guest that tries KVM out. A
// caller who does not want to wait that long ends the call.
const probeTimeout = 11 * time.Minute

type systemService struct {
	sandboxdv1.UnsafeSystemServiceServer
	*Server
}

func (s *systemService) Info(ctx context.Context, _ *sandboxdv1.InfoRequest) (*sandboxdv1.InfoResponse, error) {
	kernel, err := kernelRelease()
	if err != nil {
		return nil, err
	}
	info := &sandboxdv1.InfoResponse{
		Version:              s.Host.Version,
		Commit:               s.Host.Commit,
		GoVersion:            goruntime.Version(),
		AgentProtocolVersion: spec.ProtocolVersion,
		KernelRelease:        kernel,
		StateDir:             s.Host.StateDir,
		RunDir:               s.Host.RunDir,
		PolicyDigest:         s.Policy.Digest(),
		CgroupVersion:        s.Host.CgroupMode,
	}
	for _, p := range s.probe(ctx) {
		info.Isolations = append(info.Isolations, isolationInfoToAPI(p.isolation, p.answer))
		if p.answer.VMMVersion != "" {
			info.QemuVersion = p.answer.VMMVersion
		}
		if p.answer.GuestKernel != "" {
			info.GuestKernel = p.answer.GuestKernel
		}
	}
	return info, nil
}

type probed struct {
	isolation spec.Isolation
	answer    runtime.Availability
}

// probe asks every runtime at once what it can do on this host.
func (s *Server) probe(ctx context.Context) []probed {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	var answers []probed
	for _, i := range []spec.Isolation{spec.IsolationContainer, spec.IsolationVM} {
		if s.Runtimes[i] != nil {
			answers = append(answers, probed{isolation: i})
		}
	}
	var wg sync.WaitGroup
	for i := range answers {
		p := &answers[i]
		wg.Go(func() {
			err := s.guarded("probe", func() error {
				p.answer = probeOne(ctx, s.Runtimes[p.isolation])
				return nil
			})
			if err != nil {
				p.answer = runtime.Availability{Reason: err.Error()}
			}
		})
	}
	wg.Wait()
	return answers
}

func probeOne(ctx context.Context, r runtime.Runtime) runtime.Availability {
	prober, ok := r.(runtime.Prober)
	if !ok {
		return runtime.Availability{Available: true, Reason: "this runtime needs nothing of the host"}
	}
	return prober.Probe(ctx)
}

// Doctor answers with every check; a check that failed is part of the answer, not an error.
func (s *systemService) Doctor(ctx context.Context, _ *sandboxdv1.DoctorRequest) (*sandboxdv1.DoctorResponse, error) {
	answer := &sandboxdv1.DoctorResponse{}
	checks := s.ownChecks()
	for _, p := range s.probe(ctx) {
		checks = append(checks, isolationCheck(p.isolation, p.answer))
		for _, c := range p.answer.Checks {
			if prefix := string(p.isolation) + ": "; !strings.HasPrefix(c.Name, prefix) {
				c.Name = prefix + c.Name
			}
			checks = append(checks, c)
		}
	}
	for _, c := range checks {
		answer.Checks = append(answer.Checks, checkToAPI(c))
	}
	return answer, nil
}

// isolationCheck sums up what a runtime found.
func isolationCheck(i spec.Isolation, a runtime.Availability) runtime.Check {
	c := runtime.Check{Name: string(i) + " isolation", Result: "ok", Finding: a.Reason}
	if a.Accelerator != "" {
		c.Finding = fmt.Sprintf("%s; accelerator %s: %s", a.Reason, a.Accelerator, a.AcceleratorReason)
	}
	if a.Accelerator == "tcg" {
		c.Result = "warning"
		c.Advice = "use TCG for development only: QEMU gives no security promise for it; on a host with a working KVM start sandboxd with --vm-accel kvm"
	}
	if !a.Available {
		c.Result = "failed"
		c.Advice = "workloads that need " + string(i) + " isolation are refused on this host; see the checks below"
		// One wall that works is a working daemon, unless a check of the runtime itself says otherwise.
		if slices.ContainsFunc(a.Checks, func(c runtime.Check) bool { return c.Result == "failed" && c.Advice != "" }) {
			c.Advice = "do what the failed checks below advise; until then workloads that need " + string(i) + " isolation are refused"
		}
	}
	return c
}

func kernelRelease() (string, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return "", fmt.Errorf("cannot read the kernel release: %w", err)
	}
	return unix.ByteSliceToString(u.Release[:]), nil
}
