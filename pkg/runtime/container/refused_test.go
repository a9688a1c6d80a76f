package container

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

func TestUnknownAndInvalid(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	unknown := h.sandbox(77).ID
	if _, err := r.Attach(t.Context(), unknown); !errors.Is(err, runtime.ErrNotRunning) {
		t.Errorf("Attach = %v, want ErrNotRunning", err)
	}
	mustRemove(t, r, unknown)
	if err := r.Release(t.Context(), unknown); err != nil {
		t.Errorf("Release: %v", err)
	}
	for _, id := range []string{"", "..", "../../x", "ABC", strings.Repeat("a", 31), strings.Repeat("g", 32)} {
		s := h.sandbox(1)
		s.ID = id
		_, errStart := r.Start(t.Context(), s)
		_, errAttach := r.Attach(t.Context(), id)
		for _, err := range []error{errStart, errAttach, r.Remove(t.Context(), id), r.Release(t.Context(), id)} {
			if spec.KindOf(err) != spec.KindInvalid {
				t.Errorf("id %q: %v, want KindInvalid", id, err)
			}
		}
	}
	for name, c := range map[string]struct {
		change func(*spec.Sandbox)
		kind   spec.Kind
	}{
		"relative image": {func(s *spec.Sandbox) { s.ImagePath = "image" }, spec.KindInvalid},
		"no processor":   {func(s *spec.Sandbox) { s.Resources.CPUMillis = 0 }, spec.KindInvalid},
		"little memory":  {func(s *spec.Sandbox) { s.Resources.MemoryBytes = 1 << 20 }, spec.KindInvalid},
		"no processes":   {func(s *spec.Sandbox) { s.Resources.Pids = 0 }, spec.KindInvalid},
		"no disk":        {func(s *spec.Sandbox) { s.Resources.DiskBytes = 0 }, spec.KindInvalid},
	} {
		s := h.sandbox(1)
		c.change(&s)
		if _, err := r.Start(t.Context(), s); spec.KindOf(err) != c.kind {
			t.Errorf("%s: %v, want kind %d", name, err, c.kind)
		}
	}
}

func TestFailedStartLeavesNothing(t *testing.T) {
	garbage := filepath.Join(t.TempDir(), "garbage")
	if err := os.WriteFile(garbage, make([]byte, 1<<16), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		change func(*host, *spec.Sandbox)
		step   string
		says   string
	}{
		"no agent":              {func(h *host, _ *spec.Sandbox) { h.config.Agent = "/nonexistent" }, "fork", "cannot open the agent"},
		"agent is no program":   {func(h *host, _ *spec.Sandbox) { h.config.Agent = "/etc/passwd" }, "agent", "exec format error"},
		"agent ends":            {func(h *host, _ *spec.Sandbox) { h.config.Agent = "/bin/false" }, "agent", "agent has ended"},
		"agent says something":  {func(h *host, _ *spec.Sandbox) { h.config.Agent = "/bin/cat" }, "agent", "No such file"},
		"agent says nothing":    {func(h *host, _ *spec.Sandbox) { h.config.Agent = "/usr/bin/yes" }, "agent", "deadline exceeded"},
		"image is no image":     {func(_ *host, s *spec.Sandbox) { s.ImagePath = garbage }, "root file system", "erofs"},
		"image is a directory":  {func(_ *host, s *spec.Sandbox) { s.ImagePath = "/" }, "", "regular file"},
		"image is not there":    {func(_ *host, s *spec.Sandbox) { s.ImagePath = "/nonexistent" }, "", "no such file"},
		"layer does not fit":    {func(_ *host, s *spec.Sandbox) { s.Resources.DiskBytes = 1 << 60 }, "writable layer", "writable layer"},
		"state dir is no place": {func(h *host, _ *spec.Sandbox) { h.config.StateDir = "/dev/null/state" }, "writable layer", "not a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t)
			s := h.sandbox(1)
			saved := h.config
			c.change(h, &s)
			r := h.daemon(t)
			h.config = saved // where the leak check looks
			ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			_, err := r.Start(ctx, s)
			var failed *stepError
			if err == nil || !strings.Contains(err.Error(), c.says) || (c.step != "" && (!errors.As(err, &failed) || failed.step != c.step)) {
				t.Errorf("Start = %v (step %+v), want step %q and %q", err, failed, c.step, c.says)
			}
		})
	}
}

func TestFailedStartKeepsAnOlderLayer(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	s := h.sandbox(1)
	i := mustStart(t, r, s)
	want(t, i, "echo precious >/f; echo ok", "ok")
	if err := r.Release(t.Context(), s.ID); err != nil {
		t.Fatal(err)
	}
	h.config.Agent = "/bin/false"
	if _, err := h.daemon(t).Start(t.Context(), s); err == nil {
		t.Fatal("an agent that ends was taken for a sandbox")
	}
	i = mustStart(t, r, s)
	want(t, i, "cat /f", "precious")
	mustRemove(t, r, s.ID)
}

func TestRunDirectoryOfOthersIsRefused(t *testing.T) {
	h := newHost(t)
	if err := os.MkdirAll(h.config.RunDir, 0o700); err != nil {
		t.Fatal(err)
	}
	target := t.TempDir()
	if err := os.Symlink(target, filepath.Join(h.config.RunDir, name)); err != nil {
		t.Fatal(err)
	}
	if _, err := New(h.config); err == nil {
		t.Error("New followed a symbolic link")
	}
	if err := os.Remove(filepath.Join(h.config.RunDir, name)); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{}); err == nil {
		t.Error("New took an empty configuration")
	}
	bad := h.config
	bad.CgroupParent = "/.."
	if _, err := New(bad); err == nil {
		t.Error("New took a cgroup parent that climbs")
	}
}
