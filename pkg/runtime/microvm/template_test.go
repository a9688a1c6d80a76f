package microvm

import (
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// clonesToCompare are as many as a machine without KVM makes within a test's time.
	clonesToCompare = 6
	// templateAge is how old a template must be before its clones are compared: the clones of a young one may come to
	// differ by themselves.
	templateAge = 10 * time.Second
)

func (b *bench) useTemplates() {
	b.config.Templates = TemplateConfig{On: true, Delay: time.Hour}
}

// template makes the template for s.
func (b *bench) template(t *testing.T, r *Runtime, s spec.Sandbox) templateKey {
	t.Helper()
	made, err := r.BuildTemplate(testContext(t), s)
	if err != nil {
		t.Fatal(err)
	}
	return templateKey(made.ID)
}

// TestClones: what is cloned from a template is a VM like any other, of which nothing random is another's.
func TestClones(t *testing.T) {
	b := newBench(t)
	b.useTemplates()
	r := b.runtime(t)
	made := time.Now()
	b.template(t, r, b.sandbox())

	v := b.start(t, r)
	if f := v.Facts(); f.StartedFrom != startedTemplate || f.StartNote != "" {
		t.Fatalf("started from %q (%s)", f.StartedFrom, f.StartNote)
	}
	if got := v.sh(t, "echo hello"); got != "hello" {
		t.Errorf("a clone says %q", got)
	}
	v.client.Close()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	// The next daemon finds the clone, and the template.
	r = b.runtime(t)
	i, err := r.Attach(testContext(t), v.ID)
	if err != nil {
		t.Fatal(err)
	}
	v = &vm{Sandbox: v.Sandbox, Instance: i, client: agent.New(i.Dial, i.Done())}
	if got := v.sh(t, "echo again"); got != "again" {
		t.Errorf("an attached clone says %q", got)
	}
	v.client.Close()
	b.remove(t, r, v.ID)

	time.Sleep(time.Until(made.Add(templateAge)))
	seen := map[string]int{}
	for n := range clonesToCompare {
		v := b.start(t, r)
		if f := v.Facts(); f.StartedFrom != startedTemplate {
			t.Fatalf("clone %d: started from %q (%s)", n, f.StartedFrom, f.StartNote)
		}
		for _, script := range []string{
			"/bin/busybox head -c 1048576 /dev/urandom | /bin/busybox sha256sum",
			"cat /proc/sys/kernel/random/uuid", "cat /proc/sys/kernel/random/boot_id",
		} {
			drawn := v.sh(t, script)
			if before, ok := seen[drawn]; ok {
				t.Errorf("clones %d and %d draw the same with %s: %s", before, n, script, drawn)
			}
			seen[drawn] = n
		}
		checkClock(t, v)
		b.remove(t, r, v.ID)
	}
}

// clockSlack is how far a clone's clock may be from the host's.
const clockSlack = 10 * time.Millisecond

// checkClock asks a guest for the time, again: the second answer comes sooner, and says more.
func checkClock(t *testing.T, v *vm) {
	t.Helper()
	for range 2 {
		before := time.Now()
		said := v.sh(t, "/bin/busybox adjtimex")
		after := time.Now()
		var seconds, micros int64
		for line := range strings.Lines(said) {
			if n, ok := strings.CutPrefix(strings.TrimSpace(line), "time.tv_sec:"); ok {
				seconds, _ = strconv.ParseInt(strings.TrimSpace(n), 10, 64)
			} else if n, ok := strings.CutPrefix(strings.TrimSpace(line), "time.tv_usec:"); ok {
				micros, _ = strconv.ParseInt(strings.TrimSpace(n), 10, 64)
			}
		}
		if at := time.Unix(seconds, micros*1000); at.Before(before.Add(-clockSlack)) || at.After(after.Add(clockSlack)) {
			t.Errorf("its clock says %v between %v and %v", at, before, after)
		}
	}
}

// TestADamagedTemplateIsNotUsed: the VM is booted, says why, and the template is gone.
func TestADamagedTemplateIsNotUsed(t *testing.T) {
	b := newBench(t)
	b.useTemplates()
	r := b.runtime(t)
	key := b.template(t, r, b.sandbox())
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(b.config.StateDir, "microvm", templatesDir, string(key))
	f, err := os.OpenFile(filepath.Join(dir, stateFile), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("damaged"), 100); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	r = b.runtime(t)
	v := b.start(t, r)
	if f := v.Facts(); f.StartedFrom != startedCold || !strings.Contains(f.StartNote, "damaged") {
		t.Errorf("started from %q (%s)", f.StartedFrom, f.StartNote)
	}
	if _, err := os.Lstat(dir); !os.IsNotExist(err) {
		t.Errorf("the template is still there: %v", err)
	}
}

// TestTemplateKey: whatever a template depends on is in its name.
func TestTemplateKey(t *testing.T) {
	b := newBench(t)
	r := b.runtime(t)
	g, err := r.guest()
	if err != nil {
		t.Fatal(err)
	}
	key := func(change func(*spec.Sandbox)) templateKey {
		s := b.sandbox()
		change(&s)
		k, err := r.templateKey(s, g, accelTCG)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	same := key(func(*spec.Sandbox) {})
	if same != key(func(s *spec.Sandbox) { s.Resources.DiskBytes, s.Resources.Pids = 1<<30, 7 }) {
		t.Error("the size of the writable layer changes the template, which has none")
	}
	for name, change := range map[string]func(*spec.Sandbox){
		"memory": func(s *spec.Sandbox) { s.Resources.MemoryBytes *= 2 },
		"cpus":   func(s *spec.Sandbox) { s.Resources.CPUMillis = 2000 },
		"scope":  func(s *spec.Sandbox) { s.TemplateScope = "uid 1" },
		"image":  func(s *spec.Sandbox) { s.ImagePath = "/proc/self/exe" },
	} {
		if key(change) == same {
			t.Errorf("another %s, the same template", name)
		}
	}
}
