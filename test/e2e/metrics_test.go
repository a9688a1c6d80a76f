package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// scrape is what Prometheus would be shown.
func scrape(t *testing.T, d *harness.Daemon) string {
	t.Helper()
	c := http.Client{Timeout: harness.CallTimeout, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", d.RunDir+"/metrics.sock")
	}}}
	r, err := c.Get("http://metrics/metrics")
	must(t, err)
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	must(t, err)
	return string(b)
}

// Behind either wall the daemon shows what it did: starts and their phases, execs, ends, and whom it refused because a bound was
// reached; and who was refused is told which and what to do.
func TestMetricsAndAdmission(t *testing.T) {
	d, err := harness.NewDaemon(t.Name())
	must(t, err)
	d.Args = []string{"--metrics-addr", "unix://" + d.RunDir + "/metrics.sock", "--max-memory", "300m", "--max-workloads-per-caller", "3"}
	t.Cleanup(func() { must(t, d.Remove()) })
	d.MustStart(t)
	must(t, d.Import(busybox))
	for _, iso := range harness.Isolations {
		t.Run(iso, func(t *testing.T) {
			ended := strings.TrimSpace(d.Call(t, "create", "--isolation", iso, "--memory", "128m", busybox, "sh", "-c", "exit 3").Stdout)
			d.Call(t, "start", ended)
			d.Command("wait", ended).Run()
			id := strings.TrimSpace(d.Call(t, "run", "-d", "--isolation", iso, "--memory", "200m", "--label", "tenant=acme", busybox, "sleep", "1000").Stdout)
			d.Call(t, "exec", id, "true")
			second := strings.TrimSpace(d.Call(t, "create", "--isolation", iso, "--memory", "128m", busybox, "true").Stdout)
			d.Command("start", second).Run().WantError(t, 125, "stop a workload, or ask for less")
			d.Command("create", "--isolation", iso, busybox, "true").Run().WantError(t, 125, "may have 3")
			phase := map[string]string{"container": "start: agent", "vm": "start: guest boots"}[iso]
			got := ""
			want := []string{
				fmt.Sprintf(`sandboxd_workloads{isolation="%s",state="running"} 1`, iso),
				`sandboxd_tenant_workloads{tenant="acme"} 1`,
				`sandboxd_committed_memory_bytes 2.097152e+08`,
				fmt.Sprintf(`sandboxd_workload_starts_total{isolation="%s",result="ok"} 2`, iso),
				fmt.Sprintf(`sandboxd_workload_starts_total{isolation="%s",result="ADMISSION_MEMORY"} 1`, iso),
				fmt.Sprintf(`sandboxd_workload_start_duration_seconds_count{isolation="%s"} 2`, iso),
				fmt.Sprintf(`sandboxd_workload_phase_duration_seconds_count{isolation="%s",phase="%s"} 2`, iso, phase),
				fmt.Sprintf(`sandboxd_execs_total{isolation="%s",result="ok"} 1`, iso),
				fmt.Sprintf(`sandboxd_workload_ends_total{how="error",isolation="%s"} 1`, iso),
				`sandboxd_panics_total 0`, `sandboxd_audit_lines_lost_total 0`,
			}
			// Ends are counted by who follows the events.
			harness.Eventually(t, harness.CallTimeout, "the metrics show it", func() (bool, string) {
				got = scrape(t, d)
				var missing []string
				for _, w := range want {
					if !strings.Contains(got, w+"\n") {
						missing = append(missing, w)
					}
				}
				return len(missing) == 0, strings.Join(missing, "\n") + "\nare missing in\n" + got
			})
			if !strings.Contains(got, `sandboxd_admission_refusals_total{reason="ADMISSION_WORKLOADS"}`) {
				t.Error("a refused creation is not counted")
			}
			d.Call(t, "rm", "-f", id, ended, second)
		})
	}
}
