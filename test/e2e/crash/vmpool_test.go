package crash

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

const (
	// templatePlace and vmPoolPlace have the points that only a daemon with templates, and with a pool of clones, comes to.
	templatePlace = "vm template"
	vmPoolPlace   = "vm from the pool"

	templatesFlag = "--vm-templates=on"
	vmPoolFlag    = "--vm-pool=1"
)

// sample are the points of the two that are tried where not all are.
var sample = []string{"memory written", "made", "layer named", "goes on"}

// withVMPool has the daemon come back with a pool of clones, makes a template anew, and tells of a start from the pool.
func (u *suite) withVMPool(s *scene) error {
	u.d.Args = append(u.d.Args, vmPoolFlag)
	s.disk = 0 // the default, which the pool's clones have
	return inOrder(s.restart, s.buildTemplate,
		func() error { return u.gate.sees(vmPoolPlace + ": made") },
		func() error { return s.create(nil) }, s.start,
		func() error {
			w, err := s.get()
			if from := w.GetStatus().GetStartedFrom(); err == nil && from != "pool" {
				err = fmt.Errorf("it started from %q (%s)", from, w.GetStatus().GetStartNote())
			}
			return err
		})
}

// buildTemplate makes the template of which a scene's VM is a clone.
func (s *scene) buildTemplate() error {
	_, err := sandboxdv1.NewTemplateServiceClient(s.c.Conn()).BuildTemplate(s.ctx, &sandboxdv1.BuildTemplateRequest{
		Image: harness.Busybox, Resources: &sandboxdv1.Resources{MemoryBytes: 128 << 20},
	})
	if err != nil {
		return fmt.Errorf("build a template: %w", err)
	}
	return nil
}

func (u *suite) withoutVMPool() {
	u.d.Args = slices.DeleteFunc(u.d.Args, func(a string) bool { return a == vmPoolFlag })
}

// A daemon with templates and a pool of their clones is killed at each point of making a template, of making a clone ahead of time,
// and of handing it out.
func TestDaemonWithVMPoolDies(t *testing.T) {
	u := newSuite(t, both[1:])
	u.d.Args = append(u.d.Args, templatesFlag)
	s := u.scene("vm")
	// Where a whole template lies another may lie in the end.
	harness.Must(t, inOrder(s.restart, s.buildTemplate, s.restart))
	_ = s.c.Close() // nothing is under way
	u.clean = harness.TakeSnapshot(t, u.d)
	tried := 0
	for _, p := range points(t) {
		if p.place != templatePlace && p.place != vmPoolPlace || !*whole && !slices.Contains(sample, p.step) {
			continue
		}
		tried++
		u.try(deed{point: p, wall: "vm", name: "a start from the pool", tell: u.withVMPool, do: kill, change: u.withoutVMPool})
	}
	if tried < len(sample) {
		t.Errorf("tried %d points of %q and %q", tried, templatePlace, vmPoolPlace)
	}
	// What the test is for it finds: a daemon that does not remove what it has no record of.
	whole := u.d.Env
	u.d.Env = append(slices.Clone(whole), "SANDBOXD_WEAKEN=removal of strays")
	o, err := u.die(deed{
		point: point{place: vmPoolPlace, step: "made"}, wall: "vm", name: "a start from the pool", tell: u.withVMPool, do: kill,
		change: u.withoutVMPool, revert: func() { u.d.Env = whole }, settle: 2 * time.Second,
	})
	harness.Must(t, err)
	if len(o.leaked) == 0 {
		t.Error("without the removal of strays nothing is left: the test finds nothing")
	}
	t.Logf("without the removal of strays: left %s", strings.Join(o.leaked, "; "))
	u.farewell()
}
