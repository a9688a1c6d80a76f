package e2e

import (
	"strconv"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// TestVMPool: who starts a VM of a kind of which one waits gets that one, joined to its network, for its tenant alone.
func TestVMPool(t *testing.T) {
	d := harness.NetworkedDaemon(t, "--vm-templates", "on", "--vm-pool", "1")
	d.Watch(t)
	w := d.Wall("vm")
	waits := func(n string) {
		t.Helper()
		harness.Eventually(t, harness.LogTimeout, n+" waits", func() (bool, string) {
			r := d.Call(t, "template", "ls")
			return waiting(r.Stdout) == n, r.Stdout
		})
	}
	d.Call(t, "template", "build", "--network", "lan", busybox)
	waits("1")
	if doctor := d.Command("doctor").Run().Stdout; !strings.Contains(doctor, "1 clones wait") {
		t.Errorf("doctor does not tell of what waits:\n%s", doctor)
	}
	var ids []string
	for _, c := range []struct {
		from string
		args []string
	}{
		{"pool", []string{"--network", "lan", busybox, "sh", "-c", web}},
		{"cold", []string{"--network", "lan", "--label", "tenant=a", busybox, "sleep", "600"}}, // another tenant's
	} {
		id := w.Start(t, c.args...)
		ids = append(ids, id)
		if s := d.Inspect(t, id).Status; s.StartedFrom != c.from {
			t.Errorf("it started from %q (%s), not %q", s.StartedFrom, s.StartNote, c.from)
		}
	}
	v4, _ := addressesOf(t, d, ids[0])
	w.Exec(ids[1], fetch(v4)...).Run().WantOut(t, "served\n")
	w.Exec(ids[0], "hostname").Run().WantOut(t, ids[0][:12]+"\n")
	// The next daemon has the VM, and what waited is gone.
	waits("1")
	must(t, d.Kill())
	d.MustStart(t)
	w.Exec(ids[0], "echo", "still here").Run().WantOut(t, "still here\n")
	waits("0")
	d.Call(t, append([]string{"rm", "--force"}, ids...)...)
}

// waiting is the sum of what is in the column WAITING of a list of templates.
func waiting(list string) string {
	lines := strings.Split(strings.TrimSpace(list), "\n")
	at, sum := strings.Index(lines[0], "WAITING"), 0
	for _, line := range lines[1:] {
		n, err := strconv.Atoi(strings.Fields(line[at:])[0])
		if err != nil {
			return err.Error()
		}
		sum += n
	}
	return strconv.Itoa(sum)
}

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
