package e2e

import (
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// TestTemplates: the second VM of a kind is cloned from a template that the first gave rise to, and is a VM like any other, for
// the next daemon, too.
func TestTemplates(t *testing.T) {
	d := harness.NetworkedDaemon(t, "--vm-templates", "on")
	d.Watch(t)
	w := d.Wall("vm")
	began := func(id, from string) {
		t.Helper()
		if s := d.Inspect(t, id).Status; s.StartedFrom != from {
			t.Errorf("it started from %q (%s), not %q", s.StartedFrom, s.StartNote, from)
		}
	}
	cold := w.Start(t, "--network", "lan", busybox, "sleep", "600")
	began(cold, "cold")
	harness.Eventually(t, harness.LogTimeout, "there is a template", func() (bool, string) {
		r := d.Call(t, "template", "ls", "-q")
		return strings.Count(r.Stdout, "\n") == 1, r.Stdout
	})
	template := strings.TrimSpace(d.Call(t, "template", "ls", "-q").Stdout)
	clone := w.Start(t, "--network", "lan", busybox, "sh", "-c", web)
	began(clone, "template")
	v4, _ := addressesOf(t, d, clone)
	w.Exec(cold, fetch(v4)...).Run().WantOut(t, "served\n")
	for _, own := range [][]string{{"hostname"}, {"cat", "/proc/sys/kernel/random/boot_id"}, {"cat", "/proc/sys/kernel/random/uuid"}} {
		if a, b := w.Exec(cold, own...).Run().Stdout, w.Exec(clone, own...).Run().Stdout; a == b {
			t.Errorf("%q says the same in a clone and in what was booted: %s", own, a)
		}
	}
	must(t, d.Kill())
	d.MustStart(t)
	w.Exec(clone, "echo", "still here").Run().WantOut(t, "still here\n")
	second := w.Start(t, "--network", "lan", "--label", "tenant=a", busybox, "sleep", "600")
	began(second, "cold") // another tenant's
	third := w.Start(t, "--network", "lan", busybox, "sleep", "600")
	began(third, "template")
	d.Call(t, "template", "rm", template)
	fourth := w.Start(t, "--network", "lan", busybox, "sleep", "600")
	began(fourth, "cold")
	w.Exec(third, "echo", "still here").Run().WantOut(t, "still here\n")
	d.Call(t, "rm", "--force", cold, clone, second, third, fourth)
}
