package server

import (
	"strings"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/image"
	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// What callers see: workloads, images, decisions, usage, events.

var states = pairs[workload.State, sandboxdv1.WorkloadState]{
	{workload.StateCreated, sandboxdv1.WorkloadState_WORKLOAD_STATE_CREATED},
	{workload.StateStarting, sandboxdv1.WorkloadState_WORKLOAD_STATE_STARTING},
	{workload.StateRunning, sandboxdv1.WorkloadState_WORKLOAD_STATE_RUNNING},
	{workload.StatePaused, sandboxdv1.WorkloadState_WORKLOAD_STATE_PAUSED},
	{workload.StateStopping, sandboxdv1.WorkloadState_WORKLOAD_STATE_STOPPING},
	{workload.StateExited, sandboxdv1.WorkloadState_WORKLOAD_STATE_EXITED},
	{workload.StateFailed, sandboxdv1.WorkloadState_WORKLOAD_STATE_FAILED},
	{workload.StateDeleting, sandboxdv1.WorkloadState_WORKLOAD_STATE_DELETING},
}

var eventTypes = pairs[workload.EventType, sandboxdv1.Event_Type]{
	{workload.EventCreated, sandboxdv1.Event_TYPE_CREATED},
	{workload.EventStarting, sandboxdv1.Event_TYPE_STARTING},
	{workload.EventStarted, sandboxdv1.Event_TYPE_STARTED},
	{workload.EventStopping, sandboxdv1.Event_TYPE_STOPPING},
	{workload.EventExited, sandboxdv1.Event_TYPE_EXITED},
	{workload.EventFailed, sandboxdv1.Event_TYPE_FAILED},
	{workload.EventDeleted, sandboxdv1.Event_TYPE_DELETED},
	{workload.EventExecStarted, sandboxdv1.Event_TYPE_EXEC_STARTED},
	{workload.EventExecExited, sandboxdv1.Event_TYPE_EXEC_EXITED},
	{workload.EventRecovered, sandboxdv1.Event_TYPE_RECOVERED},
	{workload.EventPaused, sandboxdv1.Event_TYPE_PAUSED},
	{workload.EventResumed, sandboxdv1.Event_TYPE_RESUMED},
	{workload.EventUpdated, sandboxdv1.Event_TYPE_UPDATED},
	{workload.EventImageAdded, sandboxdv1.Event_TYPE_IMAGE_ADDED},
	{workload.EventImageRemoved, sandboxdv1.Event_TYPE_IMAGE_REMOVED},
}

var streams = pairs[workload.Stream, sandboxdv1.OutputStream]{
	{workload.Stdout, sandboxdv1.OutputStream_OUTPUT_STREAM_STDOUT},
	{workload.Stderr, sandboxdv1.OutputStream_OUTPUT_STREAM_STDERR},
}

var checkResults = pairs[string, sandboxdv1.Check_Result]{
	{"ok", sandboxdv1.Check_RESULT_OK},
	{"warning", sandboxdv1.Check_RESULT_WARNING},
	{"failed", sandboxdv1.Check_RESULT_FAILED},
}

// validUTF8: a string of the API with other bytes could not be sent at all, and messages may quote what came out of a
// sandbox.
func validUTF8(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

// timeToAPI: the zero time is absent.
func timeToAPI(t time.Time) *timestamppb.Timestamp {
	if t.IsZero() {
		return nil
	}
	return timestamppb.New(t)
}

func timeFromAPI(t *timestamppb.Timestamp) time.Time {
	if t == nil {
		return time.Time{}
	}
	return t.AsTime()
}

func workloadToAPI(w workload.Workload) *sandboxdv1.Workload {
	return &sandboxdv1.Workload{
		Id:        w.ID,
		Name:      w.Name,
		Labels:    w.Labels,
		Spec:      specToAPI(w.Spec),
		Status:    statusToAPI(w.Status),
		CreatedAt: timeToAPI(w.CreatedAt),

		RemoveWhenEnded: w.RemoveWhenEnded,
	}
}

func statusToAPI(s workload.Status) *sandboxdv1.WorkloadStatus {
	status := &sandboxdv1.WorkloadStatus{
		State:          states.toAPI(s.State),
		Isolation:      isolations.toAPI(s.Isolation),
		Accelerator:    s.Accelerator,
		AgentTransport: s.AgentTransport,
		StartedFrom:    s.StartedFrom,
		StartNote:      validUTF8(s.StartNote),
		Decision:       decisionToAPI(s.Decision),
		Message:        validUTF8(s.Message),
		StartedAt:      timeToAPI(s.StartedAt),
		ImageDigest:    s.ImageDigest,
		KernelRelease:  validUTF8(s.Claims.KernelRelease),
		BootId:         validUTF8(s.Claims.BootID),
		HostPid:        int32(s.HostPID),
		Networks:       networksToAPI(s.Networks),
		OomKilled:      s.OOM != nil,
		Oom:            oomToAPI(s.OOM),
	}
	if s.Exit != nil {
		code := int32(s.Exit.Code)
		status.ExitCode = &code
		status.ExitSignal = int32(s.Exit.Signal)
		status.ExitedAt = timeToAPI(s.Exit.Time)
	}
	return status
}

func networksToAPI(networks []spec.Network) []*sandboxdv1.NetworkStatus {
	var out []*sandboxdv1.NetworkStatus
	for _, n := range networks {
		a := &sandboxdv1.NetworkStatus{Name: n.Name, Interface: n.Interface, Mac: n.MAC, Mtu: n.MTU}
		for _, p := range n.Addresses {
			a.Addresses = append(a.Addresses, p.String())
		}
		for _, r := range n.Routes {
			if r.Destination.Bits() == 0 && r.Gateway.IsValid() {
				a.Gateways = append(a.Gateways, r.Gateway.String())
			}
		}
		for _, s := range n.DNS.Nameservers {
			a.Nameservers = append(a.Nameservers, s.String())
		}
		out = append(out, a)
	}
	return out
}

var oomPlaces = pairs[workload.OOMWhere, sandboxdv1.OOM_Where]{
	{workload.OOMContainer, sandboxdv1.OOM_WHERE_CONTAINER},
	{workload.OOMGuest, sandboxdv1.OOM_WHERE_GUEST},
	{workload.OOMVMM, sandboxdv1.OOM_WHERE_VMM},
}

func oomToAPI(o *workload.OOM) *sandboxdv1.OOM {
	if o == nil {
		return nil
	}
	return &sandboxdv1.OOM{Where: oomPlaces.toAPI(o.Where), Kills: o.Kills, LimitBytes: o.LimitBytes, PeakBytes: o.PeakBytes}
}

// pressureToAPI: what the host does not have is absent.
func pressureToAPI(p *spec.Pressure) *sandboxdv1.Pressure {
	if p == nil {
		return nil
	}
	return &sandboxdv1.Pressure{
		SomeAvg10: p.SomeAvg10, FullAvg10: p.FullAvg10,
		SomeTotal: durationpb.New(p.SomeTotal), FullTotal: durationpb.New(p.FullTotal),
	}
}

func decisionToAPI(d policy.Decision) *sandboxdv1.Decision {
	return &sandboxdv1.Decision{
		Isolation: isolations.toAPI(d.Isolation),
		Rule:      d.Rule,
		Reason:    d.Reason,
		Granted:   isolations.toAPI(d.Granted),
	}
}

func traceToAPI(trace []policy.Trace) []*sandboxdv1.RuleTrace {
	var out []*sandboxdv1.RuleTrace
	for _, t := range trace {
		out = append(out, &sandboxdv1.RuleTrace{Rule: t.Rule, When: t.When, Matched: t.Matched})
	}
	return out
}

func exitToAPI(e spec.Exit) *sandboxdv1.ProcessExit {
	return &sandboxdv1.ProcessExit{Code: int32(e.Code), Signal: int32(e.Signal)}
}

func usageToAPI(u workload.Usage) *sandboxdv1.Usage {
	return &sandboxdv1.Usage{
		Id:                        u.Workload.ID,
		Name:                      u.Workload.Name,
		Isolation:                 isolations.toAPI(u.Workload.Status.Isolation),
		Time:                      timeToAPI(u.Host.Time),
		CpuTime:                   durationpb.New(u.Host.CPUTime),
		MemoryBytes:               u.Host.MemoryBytes,
		MemoryPeakBytes:           u.Host.MemoryPeakBytes,
		MemoryLimitBytes:          u.Host.MemoryLimitBytes,
		MemoryCacheBytes:          u.Host.MemoryCacheBytes,
		Pids:                      u.Host.Pids,
		PidsLimit:                 u.Host.PidsLimit,
		GuestMemoryTotalBytes:     u.Claims.MemoryTotalBytes,
		GuestMemoryAvailableBytes: u.Claims.MemoryAvailableBytes,
		DiskBytes:                 u.Host.DiskBytes,
		DiskLimitBytes:            u.Host.DiskLimitBytes,
		MemoryWorkingSetBytes:     u.Host.MemoryWorkingSetBytes,
		SwapBytes:                 u.Host.SwapBytes,
		IoReadBytes:               u.Host.IOReadBytes,
		IoWriteBytes:              u.Host.IOWriteBytes,
		IoReads:                   u.Host.IOReads,
		IoWrites:                  u.Host.IOWrites,
		CpuThrottledTime:          durationpb.New(u.Host.CPUThrottled),
		CpuPressure:               pressureToAPI(u.Host.CPUPressure),
		MemoryPressure:            pressureToAPI(u.Host.MemoryPressure),
		IoPressure:                pressureToAPI(u.Host.IOPressure),
		OomKills:                  u.Host.OOMKills,
	}
}

func eventToAPI(e workload.Event) *sandboxdv1.Event {
	return &sandboxdv1.Event{
		Time:         timeToAPI(e.Time),
		Type:         eventTypes.toAPI(e.Type),
		WorkloadId:   e.WorkloadID,
		WorkloadName: e.WorkloadName,
		Isolation:    isolations.toAPI(e.Isolation),
		Message:      validUTF8(e.Message),
		Attributes:   attributesToAPI(e.Attributes),
	}
}

func attributesToAPI(attributes map[string]string) map[string]string {
	out := make(map[string]string, len(attributes))
	for key, value := range attributes {
		out[validUTF8(key)] = validUTF8(value)
	}
	return out
}

func imageToAPI(i image.Image) *sandboxdv1.Image {
	return &sandboxdv1.Image{
		Digest:    i.Digest,
		Names:     i.Names,
		SizeBytes: uint64(max(i.SizeBytes, 0)),
		CreatedAt: timeToAPI(i.CreatedAt),
		Platform:  i.Platform,
		Config:    imageConfigToAPI(i.Config),
	}
}

func imageConfigToAPI(c spec.ImageConfig) *sandboxdv1.ImageConfig {
	return &sandboxdv1.ImageConfig{
		Entrypoint: c.Entrypoint,
		Command:    c.Command,
		Env:        c.Env,
		User:       c.User,
		WorkingDir: c.WorkingDir,
		StopSignal: c.StopSignal,
		Labels:     c.Labels,
	}
}

func progressToAPI(p image.Progress) *sandboxdv1.PullProgress {
	return &sandboxdv1.PullProgress{
		Phase:      p.Phase,
		Layer:      p.Layer,
		DoneBytes:  uint64(max(p.Done, 0)),
		TotalBytes: uint64(max(p.Total, 0)),
	}
}

func checkToAPI(c runtime.Check) *sandboxdv1.Check {
	return &sandboxdv1.Check{
		Name:    c.Name,
		Result:  checkResults.toAPI(c.Result),
		Finding: c.Finding,
		Advice:  c.Advice,
	}
}

func isolationInfoToAPI(i spec.Isolation, a runtime.Availability) *sandboxdv1.IsolationInfo {
	return &sandboxdv1.IsolationInfo{
		Isolation:         isolations.toAPI(i),
		Available:         a.Available,
		Reason:            a.Reason,
		Accelerator:       a.Accelerator,
		AcceleratorReason: a.AcceleratorReason,
		AgentTransport:    a.AgentTransport,
	}
}

func ruleToAPI(r policy.Rule) *sandboxdv1.PolicyRule {
	return &sandboxdv1.PolicyRule{Name: r.Name, When: r.When, Answer: r.Answer, Reason: r.Reason, Seccomp: r.Seccomp}
}
