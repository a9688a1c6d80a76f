package microvm

import (
	"flag"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/pkg/agent"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// clonesToCompare are as many as a machine without KVM makes within a test's time.
var clonesToCompare = flag.Int("clones", 6, "how many clones TestClonesDrawDifferently compares")

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

// TestClones: what is cloned from a template is a VM like any other, which the next daemon finds.
func TestClones(t *testing.T) {
	b := newBench(t)
	b.useTemplates()
	r := b.runtime(t)
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
}

// TestClonesDrawDifferently: nothing random of a clone is another's, be the template as old as it likes, nor of one that had waited.
func TestClonesDrawDifferently(t *testing.T) {
	for _, from := range []string{startedTemplate, startedPool} {
		t.Run(from, func(t *testing.T) {
			b := newBench(t)
			b.useTemplates()
			b.config.Agent = filepath.Join(b.programs, agedAgent)
			if from == startedPool {
				b.config.Templates.Pool.Size = 2
			}
			r := b.runtime(t)
			key := b.template(t, r, b.sandbox())
			same := b.drawFromClones(t, r, *clonesToCompare, []string{"/bin/draws"}, func() string {
				if from == startedPool {
					awaitWaiting(t, r, key, 2)
				}
				return from
			})
			if len(same) > 0 {
				t.Errorf("the same was drawn by more than one clone: %q", same)
			}
		})
	}
}

// drawFromClones starts clones one after another, has each draw, and answers with the lines that more than one drew. begin says, before
// each, what it must start from.
func (b *bench) drawFromClones(t *testing.T, r *Runtime, clones int, scripts []string, begin func() string) (same []string) {
	t.Helper()
	seen := map[string]bool{}
	for range clones {
		from := begin()
		v := b.start(t, r)
		wantStarted(t, v, from)
		for _, script := range scripts {
			for drawn := range strings.Lines(v.sh(t, script)) {
				if seen[drawn] {
					same = append(same, script+": "+drawn)
				}
				seen[drawn] = true
			}
		}
		checkClock(t, v)
		v.client.Close()
		b.remove(t, r, v.ID)
	}
	t.Logf("%d clones drew %d different lines", clones, len(seen))
	return same
}

// TestClonesThatAreNotReseededDrawTheSame: TestClonesDrawDifferently proves nothing unless this is so.
func TestClonesThatAreNotReseededDrawTheSame(t *testing.T) {
	b := newBench(t)
	b.useTemplates()
	b.config.Agent = filepath.Join(b.programs, unseededAgent)
	r := b.runtime(t)
	b.template(t, r, b.sandbox())
	if same := b.drawFromClones(t, r, 4, []string{"cat /proc/sys/kernel/random/uuid"}, func() string { return startedTemplate }); len(same) == 0 {
		t.Error("four clones of one template, not reseeded, drew four different numbers")
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
		"memory":       func(s *spec.Sandbox) { s.Resources.MemoryBytes *= 2 },
		"cpus":         func(s *spec.Sandbox) { s.Resources.CPUMillis = 2000 },
		"scope":        func(s *spec.Sandbox) { s.TemplateScope = "uid 1" },
		"network card": func(s *spec.Sandbox) { s.Network = "front" },
		"image":        func(s *spec.Sandbox) { s.ImagePath = "/proc/self/exe" },
	} {
		if key(change) == same {
			t.Errorf("another %s, the same template", name)
		}
	}
}
