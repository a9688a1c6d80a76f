package workload

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/idrange"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// withIDs has a fake's instances say that they have ids of their own.
type withIDs struct{ runtime.Runtime }

type instanceWithIDs struct{ runtime.Instance }

const fakeBase = 7 * idrange.Size

func (i instanceWithIDs) Facts() runtime.Facts {
	f := i.Instance.Facts()
	f.IDBase = fakeBase
	return f
}

func (w withIDs) Start(ctx context.Context, s spec.Sandbox) (runtime.Instance, error) {
	i, err := w.Runtime.Start(ctx, s)
	if err != nil {
		return nil, err
	}
	return instanceWithIDs{i}, nil
}

// The configuration is that of the last start, whatever would be made of the same request today, and a further process is
// made by it.
func TestConfigIsTheOneTheAgentGot(t *testing.T) {
	h := newHost(t)
	h.rt.Runtime = withIDs{h.rt.Runtime}
	setEnv := func(value string) {
		img := h.images["busybox"]
		img.Config.Env = []string{"MADE=" + value}
		h.images["busybox"] = img
	}
	config := func(m *Manager, id string) *specs.Spec {
		t.Helper()
		b, err := m.OCIConfig(h.ctx(), id)
		if err != nil {
			t.Fatal(err)
		}
		c := new(specs.Spec)
		if err := json.Unmarshal(b, c); err != nil {
			t.Fatal(err)
		}
		return c
	}
	made := func(c *specs.Spec) string { return strings.Join(c.Process.Env, " ") }

	m := h.open()
	setEnv("first")
	id := h.create(m, "cat")
	if c := config(m, id); !strings.Contains(made(c), "MADE=first") || len(c.Linux.UIDMappings) > 0 {
		t.Errorf("before the first start: %s, ids %v", made(c), c.Linux.UIDMappings)
	}
	setEnv("second")
	if _, err := m.Start(h.ctx(), id); err != nil {
		t.Fatal(err)
	}
	setEnv("third")
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = h.boot()
	want := specs.LinuxIDMapping{HostID: fakeBase, Size: idrange.Size}
	if c := config(m, id); !strings.Contains(made(c), "MADE=second") || len(c.Linux.UIDMappings) != 1 || c.Linux.UIDMappings[0] != want ||
		len(c.Linux.GIDMappings) != 1 || c.Linux.GIDMappings[0] != want || c.Linux.Seccomp == nil {
		t.Errorf("after the start: %s, ids %v %v", made(c), c.Linux.UIDMappings, c.Linux.GIDMappings)
	}
	s, err := m.Exec(h.ctx(), id, spec.Process{Command: []string{"/bin/sh", "-c", `[ "$MADE" = second ]`}})
	if err != nil {
		t.Fatal(err)
	}
	if exit, err := s.Wait(h.ctx()); err != nil || exit.Code != 0 {
		t.Errorf("a further process has another configuration: exit code %d, %v", exit.Code, err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := m.Delete(h.ctx(), id, true); err != nil {
		t.Fatal(err)
	}
	if left, err := m.store.config(id); left != nil || err != nil {
		t.Errorf("after the removal %d bytes are left, %v", len(left), err)
	}
}
