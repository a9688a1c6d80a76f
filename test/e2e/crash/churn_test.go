package crash

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

const (
	// warmUp is how many lives it takes until everything that is kept has been made, and the heap has grown as it does.
	warmUp = 40
	// heapSlack is what the daemon's memory may have grown by, however many lives there were: what a garbage collector has not
	// collected yet, and caches that are bounded.
	heapSlack = 24 << 20
	// goroutineSlack are those of the last calls, which are about to end.
	goroutineSlack = 4
)

// Workloads come and go, and the daemon stays as it was: descriptors, goroutines, memory, and all that a sandbox has on the host.
func TestChurn(t *testing.T) {
	d := harness.MakeNetworkedDaemon(t)
	d.Args = append(d.Args, "--metrics-addr", "unix://"+d.RunDir+"/metrics.sock")
	d.MustStart(t)
	harness.Must(t, d.Import(harness.Busybox))
	live := func(n int) {
		for i := range n {
			ctx, cancel := context.WithTimeout(t.Context(), sceneLimit)
			s := &scene{ctx: ctx, d: d, wall: "container", name: fmt.Sprint("churn-", i), asked: map[string]bool{}, told: map[string]bool{}, files: map[string]string{}}
			harness.Must(t, s.dial())
			harness.Must(t, inOrder(func() error { return s.create(nil) }, s.start, func() error { return s.delete(true) }))
			harness.Must(t, s.c.Close())
			cancel()
		}
	}
	live(warmUp)
	clean := harness.TakeSnapshot(t, d)
	before := vitals(t, d)
	began := time.Now()
	live(*cycles)
	t.Logf("%d lives in %s", *cycles, time.Since(began).Round(time.Millisecond))
	clean.WantNothingNew(t, d)
	harness.Eventually(t, harness.SettleTimeout, "goroutines and memory as before", func() (bool, string) {
		after := vitals(t, d)
		return after["go_goroutines"] <= before["go_goroutines"]+goroutineSlack && after["rss"] <= before["rss"]+heapSlack,
			fmt.Sprintf("before %v, after %v", before, after)
	})
	t.Logf("before %v, after %v", before, vitals(t, d))
}

// vitals are the daemon's goroutines, and the bytes of memory it has.
func vitals(t *testing.T, d *harness.Daemon) map[string]float64 {
	t.Helper()
	c := http.Client{Timeout: harness.LogTimeout, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", d.RunDir+"/metrics.sock")
	}}}
	r, err := c.Get("http://metrics/metrics")
	harness.Must(t, err)
	defer r.Body.Close()
	body, err := io.ReadAll(r.Body)
	harness.Must(t, err)
	found := map[string]float64{}
	for line := range strings.Lines(string(body)) {
		if value, ok := strings.CutPrefix(line, "go_goroutines "); ok {
			found["go_goroutines"], err = strconv.ParseFloat(strings.TrimSpace(value), 64)
			harness.Must(t, err)
		}
	}
	if found["go_goroutines"] == 0 {
		t.Fatalf("the daemon does not say how many goroutines it has:\n%s", harness.Abridged(string(body)))
	}
	statm, err := os.ReadFile(fmt.Sprintf("/proc/%d/statm", d.Cmd.Process.Pid))
	harness.Must(t, err)
	pages, err := strconv.ParseFloat(strings.Fields(string(statm))[1], 64)
	harness.Must(t, err)
	found["rss"] = pages * float64(os.Getpagesize())
	return found
}
