package metrics

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

func fake(workloads map[Group]int) Sources {
	return Sources{
		Workloads: func() map[Group]int { return workloads },
		Committed: func() (uint64, uint64) { return 3 << 30, 1536 },
		AuditLost: func() uint64 { return 2 },
		IsolationOf: func(id string) string {
			return map[string]string{"c": "container", "v": "vm"}[id]
		},
	}
}

// used is what a daemon shows that has done a bit of everything.
func used() *Metrics {
	m := New("1.2.3", "abc", fake(map[Group]int{{"container", "running", "a"}: 2, {"vm", "exited", ""}: 1}))
	m.Call("/sandboxd.v1.WorkloadService/CreateWorkload", "OK", "", false, time.Millisecond)
	m.Call("/sandboxd.v1.WorkloadService/StartWorkload", "ResourceExhausted", "ADMISSION_MEMORY", false, time.Millisecond)
	m.Panic()
	m.Start(spec.IsolationVM, nil, time.Second)
	m.Start(spec.IsolationContainer, spec.Errorf(spec.KindExhausted, "x").WithReason("ADMISSION_MEMORY"), time.Second)
	m.Start("", errors.New("x"), time.Second)
	m.Exec(spec.IsolationContainer, nil, time.Millisecond)
	m.Pull(nil, time.Second)
	m.End(spec.IsolationContainer, "ok")
	m.Missed()
	m.Phase(phase.Record{ID: "v", Phase: "start: guest boots", Took: 1e9})
	m.Phase(phase.Record{ID: "v", Phase: "agent: of its own invention", Took: 1e9})
	m.Phase(phase.Record{ID: "nobody", Phase: "start: layer", Took: 1e9})
	return m
}

// The names keep to Prometheus' conventions.
func TestConventions(t *testing.T) {
	problems, err := testutil.GatherAndLint(used().registry)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		t.Errorf("%s: %s", p.Metric, p.Text)
	}
}

func TestNilCountsNothing(*testing.T) {
	var m *Metrics
	m.Call("/x", "OK", "", false, 0)
	m.Panic()
	m.Start("", nil, 0)
	m.Exec("", nil, 0)
	m.Pull(nil, 0)
}

// shown is what a scrape answers with, by the address.
func shown(t *testing.T, m *Metrics, address string) string {
	t.Helper()
	l, err := Listen(address)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- m.Serve(ctx, l) }()
	defer func() {
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}()
	c := http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, l.Addr().Network(), l.Addr().String())
	}}}
	r, err := c.Get("http://metrics/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("%s %v", r.Status, err)
	}
	return string(b)
}

func TestShown(t *testing.T) {
	m := used()
	socket := filepath.Join(t.TempDir(), "m.sock")
	for _, address := range []string{"127.0.0.1:0", "unix://" + socket, "unix://" + socket} {
		got := shown(t, m, address)
		for _, want := range []string{
			`sandboxd_workloads{isolation="container",state="running"} 2`,
			`sandboxd_tenant_workloads{tenant="a"} 2`,
			`sandboxd_workload_starts_total{isolation="container",result="ADMISSION_MEMORY"} 1`,
			`sandboxd_workload_starts_total{isolation="unknown",result="INTERNAL"} 1`,
			`sandboxd_workload_start_duration_seconds_count{isolation="vm"} 1`,
			`sandboxd_workload_phase_duration_seconds_count{isolation="vm",phase="start: guest boots"} 1`,
			`sandboxd_api_calls_total{code="OK",method="WorkloadService/CreateWorkload"} 1`,
			`sandboxd_admission_refusals_total{reason="ADMISSION_MEMORY"} 1`,
			`sandboxd_panics_total 1`, `sandboxd_audit_lines_lost_total 2`, `sandboxd_committed_pids 1536`,
			`sandboxd_build_info{commit="abc",version="1.2.3"} 1`,
		} {
			if !strings.Contains(got, want+"\n") {
				t.Errorf("%s shows no %s", address, want)
			}
		}
		if strings.Contains(got, "invention") || strings.Contains(got, "start: layer") {
			t.Error("what an agent says, or what is no workload's, is shown")
		}
	}
}

// However many tenants and phases there are, there are few series.
func TestCardinalityIsBounded(t *testing.T) {
	many := map[Group]int{}
	for i := range 1000 {
		many[Group{"vm", "running", fmt.Sprintf("tenant-%04d\xff", i)}] = 1000 - i
	}
	m := New("", "", fake(many))
	for i := range 1000 {
		m.Phase(phase.Record{ID: "v", Phase: fmt.Sprintf("start: %d", i)})
	}
	if n := testutil.CollectAndCount(census{fake(many)}, "sandboxd_tenant_workloads"); n != maxTenants+1 {
		t.Errorf("%d tenants are told apart, want %d", n, maxTenants+1)
	}
	if n := testutil.CollectAndCount(m.phases); n != maxPhases+1 {
		t.Errorf("%d phases are told apart, want %d", n, maxPhases+1)
	}
	if _, err := m.registry.Gather(); err != nil {
		t.Error(err)
	}
}

// Only this host may look: nobody is asked who he is.
func TestAddresses(t *testing.T) {
	for address, ok := range map[string]bool{
		"127.0.0.1:9464": true, "[::1]:9464": true, "unix:///run/x": true,
		"0.0.0.0:9464": false, ":9464": false, "10.0.0.1:1": false, "localhost:9464": false, "unix://x": false, "": false, "9464": false,
	} {
		if err := CheckAddress(address); (err == nil) != ok {
			t.Errorf("%q: %v, want accepted %t", address, err, ok)
		}
	}
}

// Each name in the dashboard is of a metric that there is, and each of ours is in it.
func TestDashboard(t *testing.T) {
	b, err := os.ReadFile("../../deploy/grafana/sandboxd.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &board); err != nil {
		t.Fatal(err)
	}
	there := map[string]bool{}
	families, err := used().registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range families {
		there[f.GetName()] = false
		if f.GetType().String() == "HISTOGRAM" {
			there[f.GetName()+"_bucket"] = false
			delete(there, f.GetName())
		}
	}
	name := regexp.MustCompile(`\b(sandboxd|process|go)_[a-z_]+\b`)
	for _, p := range board.Panels {
		if len(p.Targets) == 0 {
			t.Errorf("panel %q shows nothing", p.Title)
		}
		for _, target := range p.Targets {
			for _, n := range name.FindAllString(target.Expr, -1) {
				if _, ok := there[n]; !ok {
					t.Errorf("panel %q: there is no metric %s", p.Title, n)
				}
				there[n] = true
			}
		}
	}
	for n, shown := range there {
		if strings.HasPrefix(n, "sandboxd_") && !shown {
			t.Errorf("%s is in no panel", n)
		}
	}
}

var _ prometheus.Collector = census{}
