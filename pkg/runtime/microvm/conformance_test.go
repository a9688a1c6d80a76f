package microvm

import (
	"path/filepath"
	"testing"

	"go.uber.org/zap/zaptest"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/idrange"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/runtime/runtimetest"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// TestConformance: what every runtime must do.
func TestConformance(t *testing.T) {
	b := newBench(t)
	runtimetest.Run(t, runtimetest.Factory{
		Isolation: spec.IsolationVM,
		New: func(t *testing.T, dir string) runtime.Runtime {
			config := b.config
			config.RunDir, config.StateDir = filepath.Join(dir, "run"), filepath.Join(dir, "state")
			config.Disk = disk.NewMaker(filepath.Join(b.dir, "templates"))
			config.Logger = zaptest.NewLogger(t)
			var err error
			if config.IDs, err = idrange.Open(filepath.Join(dir, "ids")); err != nil {
				t.Fatal(err)
			}
			r, err := New(config)
			if err != nil {
				t.Fatal(err)
			}
			return r
		},
	})
}

// TestANewCgroupParentFindsOldVMs: a daemon whose configuration changed must neither lose a VM nor give its ids and its
// disk to others while it runs.
func TestANewCgroupParentFindsOldVMs(t *testing.T) {
	b := newBench(t)
	s := b.sandbox()
	first := b.runtime(t)
	ctx := testContext(t)
	if _, err := first.Start(ctx, s); err != nil {
		t.Fatal(err)
	}
	rec, err := loadRecord(first.dir(s.ID))
	if err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	before := b.config.CgroupParent
	b.config.CgroupParent += "-other"
	second := b.runtime(t)
	t.Cleanup(func() {
		if err := cgroup.RemoveParent(before); err != nil {
			t.Error(err)
		}
	})
	if _, err := second.Attach(ctx, s.ID); err != nil {
		t.Errorf("attach: %v", err)
	}
	b.remove(t, second, s.ID)
	for _, p := range rec.processes() {
		if pidfd, err := p.process.open(); err == nil {
			pidfd.Close()
			t.Errorf("process %d runs on after its VM was removed", p.process.PID)
		}
	}
}
