package e2e

import (
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// A call that is made again with its idempotency key, also after the daemon died, makes no second workload: it goes on with
// the first, whose output and exit code it tells.
func TestIdempotencyKey(t *testing.T) {
	d := harness.OwnDaemon(t)
	for _, iso := range harness.Isolations {
		t.Run(iso, func(t *testing.T) {
			run := []string{"run", "--isolation", iso, "--idempotency-key", "job-" + iso, busybox, "sh", "-c", "echo once; exit 7"}
			first := d.Command(run...).Run()
			if first.Code != 7 || first.Stdout != "once\n" {
				t.Fatalf("the first try: %d %q %q", first.Code, first.Stdout, first.Stderr)
			}
			must(t, d.Kill())
			d.MustStart(t)
			for range 2 {
				if r := d.Command(run...).Run(); r.Code != 7 || r.Stdout != "once\n" {
					t.Errorf("a retry: %d %q %q", r.Code, r.Stdout, r.Stderr)
				}
			}
			detached := []string{"run", "-d", "--isolation", iso, "--idempotency-key", "d-" + iso, busybox, "sleep", "1000"}
			id := d.Call(t, detached...).Stdout
			if again := d.Call(t, detached...).Stdout; again != id {
				t.Errorf("a retry made %s beside %s", again, id)
			}
			d.Command("create", "--isolation", iso, "--idempotency-key", "d-"+iso, busybox, "true").Run().WantError(t, 125, "from another request")
		})
	}
}
