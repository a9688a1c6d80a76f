package runtimetest

import (
	"context"
	"errors"
	"slices"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

func TestFakeConformance(t *testing.T) {
	Run(t, Factory{
		Isolation: spec.IsolationContainer,
		New:       func(t *testing.T, dir string) runtime.Runtime { return NewFake(t, dir) },
		NoWalls:   true,
	})
}

// What the suite leaves out of fakes for want of walls.
func TestFakeRelease(t *testing.T) {
	f := NewFake(t, t.TempDir())
	id := newID()
	s := spec.Sandbox{ID: id, ImagePath: "/dev/null", Resources: Resources}
	for range 2 {
		if _, err := f.Start(t.Context(), s); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Start(t.Context(), s); spec.KindOf(err) != spec.KindAlreadyExists {
			t.Errorf("started twice: %v", err)
		}
		if err := f.Release(t.Context(), id); err != nil {
			t.Fatal(err)
		}
		if ids, err := f.List(t.Context()); err != nil || !slices.Equal(ids, []string{id}) {
			t.Errorf("List says %v, %v", ids, err)
		}
	}
	if err := f.Remove(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	if ids, err := f.List(t.Context()); err != nil || len(ids) > 0 {
		t.Errorf("List says %v, %v", ids, err)
	}
}

func TestFakeRefuses(t *testing.T) {
	f := NewFake(t, t.TempDir())
	s := spec.Sandbox{ID: newID(), ImagePath: "/dev/null", Resources: Resources}
	undecided := s
	undecided.Resources.Pids = 0
	if _, err := f.Start(t.Context(), undecided); spec.KindOf(err) != spec.KindInvalid {
		t.Errorf("without a limit: %v", err)
	}
	named := s
	named.ID = "../x"
	if _, err := f.Start(t.Context(), named); spec.KindOf(err) != spec.KindInvalid {
		t.Errorf("with a name that is no id: %v", err)
	}
	wanted := errors.New("as asked")
	f.OnStart = func(context.Context, spec.Sandbox) error { return wanted }
	if _, err := f.Start(t.Context(), s); !errors.Is(err, wanted) {
		t.Errorf("OnStart: %v", err)
	}
	if ids, err := f.List(t.Context()); err != nil || len(ids) > 0 {
		t.Errorf("List says %v, %v", ids, err)
	}
}
