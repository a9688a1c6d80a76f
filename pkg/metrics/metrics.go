// Package metrics counts what the daemon does, for Prometheus. Labels have few values each: a method, a code, an isolation, a
// state, a phase; what callers or sandboxes choose freely is in none, but for the tenant, of which maxTenants are told apart.
package metrics

import (
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// maxTenants is how many values the label tenant has; the other tenants are one.
	maxTenants = 50
	// otherTenants cannot be a tenant's name by chance.
	otherTenants = "(others)"
	// maxPhases bounds the label phase: the names are ours, this is against a mistake.
	maxPhases = 64
)

// The buckets reach from a container's phase to a start of VMs on an overloaded host.
var (
	phaseBuckets = prometheus.ExponentialBuckets(0.0001, 3, 13) // 0.1 ms to 53 s
	startBuckets = prometheus.ExponentialBuckets(0.002, 2, 17)  // 2 ms to 131 s
	callBuckets  = prometheus.ExponentialBuckets(0.0005, 4, 9)  // 0.5 ms to 33 s
)

// Group is workloads that have these in common.
type Group struct{ Isolation, State, Tenant string }

// Sources are asked when somebody looks.
type Sources struct {
	// How many workloads there are of each group.
	Workloads func() map[Group]int
	// What those with a sandbox may use together.
	Committed func() (memory, pids uint64)
	// Lines missing in the audit log; nil without one.
	AuditLost func() uint64
	// The isolation of a workload by its id; empty if there is none.
	IsolationOf func(id string) string
}

// Metrics are the daemon's. A nil one counts nothing.
type Metrics struct {
	registry *prometheus.Registry

	calls        *prometheus.CounterVec
	callTime     *prometheus.HistogramVec
	panics       prometheus.Counter
	refusals     *prometheus.CounterVec
	starts       *prometheus.CounterVec
	startTime    *prometheus.HistogramVec
	phases       *prometheus.HistogramVec
	execTime     *prometheus.HistogramVec
	execs        *prometheus.CounterVec
	pulls        *prometheus.CounterVec
	pullTime     prometheus.Histogram
	ends         *prometheus.CounterVec
	eventsMissed prometheus.Counter

	isolationOf func(string) string

	mu         sync.Mutex // guards what follows
	phaseNames map[string]bool
}

// New makes them. version is of the daemon.
func New(version, commit string, s Sources) *Metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: "sandboxd", Name: name, Help: help}, labels)
	}
	histogram := func(name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
		return prometheus.NewHistogramVec(prometheus.HistogramOpts{Namespace: "sandboxd", Name: name, Help: help, Buckets: buckets}, labels)
	}
	m := &Metrics{
		registry:    prometheus.NewPedanticRegistry(),
		isolationOf: s.IsolationOf,
		phaseNames:  map[string]bool{},

		calls:    counter("api_calls_total", "Calls of the API that have ended, by method and gRPC code.", "method", "code"),
		callTime: histogram("api_call_duration_seconds", "How long calls took that are not streams, by method.", callBuckets, "method"),
		panics:   prometheus.NewCounter(prometheus.CounterOpts{Namespace: "sandboxd", Name: "panics_total", Help: "Panics that ended a call and not the daemon; its log has their stacks."}),
		refusals: counter("admission_refusals_total", "Calls refused because a bound was reached, by its reason.", "reason"),
		starts:   counter("workload_starts_total", "Starts by isolation and result: ok, or the reason of the error.", "isolation", "result"),
		startTime: histogram("workload_start_duration_seconds", "From a StartWorkload to the running process, of those that came to run.",
			startBuckets, "isolation"),
		phases:   histogram("workload_phase_duration_seconds", "How long each phase of a workload's life took.", phaseBuckets, "isolation", "phase"),
		execs:    counter("execs_total", "Processes exec'd, by isolation and result: ok, or the reason of the error.", "isolation", "result"),
		execTime: histogram("exec_start_duration_seconds", "From an Exec to its running process.", phaseBuckets, "isolation"),
		pulls:    counter("image_pulls_total", "Pulls of images by result: ok, or the reason of the error.", "result"),
		pullTime: prometheus.NewHistogram(prometheus.HistogramOpts{Namespace: "sandboxd", Name: "image_pull_duration_seconds",
			Help: "How long pulls took that succeeded.", Buckets: startBuckets}),
		ends: counter("workload_ends_total", "Ends of workloads by isolation and how: ok (code 0), error (another code), failed (its sandbox was lost or not built).", "isolation", "how"),
		eventsMissed: prometheus.NewCounter(prometheus.CounterOpts{Namespace: "sandboxd", Name: "events_missed_total",
			Help: "Times the counting of ends and phases fell behind and may have missed some."}),
	}
	info := prometheus.NewGauge(prometheus.GaugeOpts{Namespace: "sandboxd", Name: "build_info", Help: "Always 1; the labels say which sandboxd it is.",
		ConstLabels: prometheus.Labels{"version": version, "commit": commit}})
	info.Set(1)
	m.registry.MustRegister(info, m.calls, m.callTime, m.panics, m.refusals, m.starts, m.startTime, m.phases, m.execs, m.execTime, m.pulls, m.pullTime,
		m.ends, m.eventsMissed, census{s}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	if s.AuditLost != nil {
		m.registry.MustRegister(prometheus.NewCounterFunc(prometheus.CounterOpts{Namespace: "sandboxd", Name: "audit_lines_lost_total",
			Help: "Lines that could not be written to the audit log."}, func() float64 { return float64(s.AuditLost()) }))
	}
	return m
}

// Call is a call of the API that has ended. reason is of its error.
func (m *Metrics) Call(method, code, reason string, stream bool, took time.Duration) {
	if m == nil {
		return
	}
	name := method[strings.LastIndexByte(method, '.')+1:] // WorkloadService/Exec
	m.calls.WithLabelValues(name, code).Inc()
	if !stream {
		m.callTime.WithLabelValues(name).Observe(took.Seconds())
	}
	if code == "ResourceExhausted" {
		m.refusals.WithLabelValues(reason).Inc()
	}
}

// Panic is one that was recovered.
func (m *Metrics) Panic() {
	if m != nil {
		m.panics.Inc()
	}
}

// Start is a start of a workload that has succeeded or not.
func (m *Metrics) Start(i spec.Isolation, err error, took time.Duration) {
	if m == nil {
		return
	}
	m.starts.WithLabelValues(isolation(i), result(err)).Inc()
	if err == nil {
		m.startTime.WithLabelValues(isolation(i)).Observe(took.Seconds())
	}
}

// Exec is a process that was exec'd, or could not be.
func (m *Metrics) Exec(i spec.Isolation, err error, took time.Duration) {
	if m == nil {
		return
	}
	m.execs.WithLabelValues(isolation(i), result(err)).Inc()
	if err == nil {
		m.execTime.WithLabelValues(isolation(i)).Observe(took.Seconds())
	}
}

// Pull is a pull of an image.
func (m *Metrics) Pull(err error, took time.Duration) {
	if m == nil {
		return
	}
	m.pulls.WithLabelValues(result(err)).Inc()
	if err == nil {
		m.pullTime.Observe(took.Seconds())
	}
}

// End is the end of a workload; how is ok, error or failed.
func (m *Metrics) End(i spec.Isolation, how string) {
	m.ends.WithLabelValues(isolation(i), how).Inc()
}

// Missed says that an end or a phase may have been missed.
func (m *Metrics) Missed() { m.eventsMissed.Inc() }

// Phase is one of a workload's life. What is no workload's, or comes from inside a sandbox, is left out.
func (m *Metrics) Phase(r phase.Record) {
	name, known := phaseName(r.Phase)
	if !known {
		return
	}
	i := m.isolationOf(r.ID)
	if i == "" {
		return
	}
	m.mu.Lock()
	if !m.phaseNames[name] && len(m.phaseNames) == maxPhases {
		name = "other"
	} else {
		m.phaseNames[name] = true
	}
	m.mu.Unlock()
	m.phases.WithLabelValues(i, name).Observe(time.Duration(r.Took).Seconds())
}

// phaseName leaves out what an agent claims, and how long the process itself ran.
func phaseName(name string) (string, bool) {
	return name, name != "process runs" && !strings.HasPrefix(name, "agent: ")
}

func isolation(i spec.Isolation) string {
	if i == "" {
		return "unknown"
	}
	return string(i)
}

// kinds are what an error without a reason of its own is called.
var kinds = map[spec.Kind]string{
	spec.KindInternal: "INTERNAL", spec.KindNotFound: "NOT_FOUND", spec.KindAlreadyExists: "ALREADY_EXISTS", spec.KindInvalid: "INVALID",
	spec.KindWrongState: "WRONG_STATE", spec.KindDenied: "DENIED", spec.KindExhausted: "EXHAUSTED", spec.KindUnavailable: "UNAVAILABLE",
	spec.KindUnsupported: "UNSUPPORTED",
}

func result(err error) string {
	if err == nil {
		return "ok"
	}
	if reason := spec.ReasonOf(err); reason != "" {
		return reason
	}
	return kinds[spec.KindOf(err)]
}

// census counts workloads when somebody looks.
type census struct{ Sources }

var (
	workloadsDesc = prometheus.NewDesc("sandboxd_workloads", "Workloads by isolation and state.", []string{"isolation", "state"}, nil)
	tenantsDesc   = prometheus.NewDesc("sandboxd_tenant_workloads", "Workloads by their label tenant; the smaller tenants beyond the first 50 are one.", []string{"tenant"}, nil)
	memoryDesc    = prometheus.NewDesc("sandboxd_committed_memory_bytes", "Memory that the workloads with a sandbox may use together.", nil, nil)
	pidsDesc      = prometheus.NewDesc("sandboxd_committed_pids", "Processes that the workloads with a sandbox may have together.", nil, nil)
)

func (census) Describe(c chan<- *prometheus.Desc) {
	c <- workloadsDesc
	c <- tenantsDesc
	c <- memoryDesc
	c <- pidsDesc
}

func (s census) Collect(c chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		c <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	type kind struct{ isolation, state string }
	kinds, tenants := map[kind]int{}, map[string]int{}
	for g, n := range s.Workloads() {
		kinds[kind{g.Isolation, g.State}] += n
		if g.Tenant != "" {
			tenants[g.Tenant] += n
		}
	}
	for k, n := range kinds {
		gauge(workloadsDesc, float64(n), k.isolation, k.state)
	}
	for tenant, n := range largest(tenants) {
		gauge(tenantsDesc, float64(n), tenant)
	}
	memory, pids := s.Committed()
	gauge(memoryDesc, float64(memory))
	gauge(pidsDesc, float64(pids))
}

// largest are the maxTenants with the most workloads, by name among equals, and the rest as one.
func largest(tenants map[string]int) map[string]int {
	names := slices.SortedFunc(maps.Keys(tenants), func(a, b string) int {
		if d := tenants[b] - tenants[a]; d != 0 {
			return d
		}
		return strings.Compare(a, b)
	})
	out := map[string]int{}
	for i, name := range names {
		if i >= maxTenants {
			out[otherTenants] += tenants[name]
			continue
		}
		out[strings.ToValidUTF8(name, "?")] += tenants[name]
	}
	return out
}
