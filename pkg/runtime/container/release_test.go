package container

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// A teardown may end anywhere: because its daemon was killed, or because a step failed. Start refuses what is left; after
// Release, by the same daemon or by the next, it must never have a reason to.
func TestReleaseFinishesEveryTeardown(t *testing.T) {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil { // as in TestDaemonDiesInTheMiddleOfAStart
		t.Fatal(err)
	}
	defer unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0) //nolint:errcheck // a test's
	for name, left := range map[string]func(t *testing.T, r *Runtime, id string) error{
		"everything": func(*testing.T, *Runtime, string) error { return nil },
		"ended processes": func(_ *testing.T, r *Runtime, id string) error {
			group, err := cgroup.Load(r.config.CgroupParent, id)
			return errors.Join(err, group.Kill())
		},
		"no cgroup": endOnly,
		"no cgroup and no loop device": func(t *testing.T, r *Runtime, id string) error {
			err := endOnly(t, r, id)
			r.layers.settle(id)
			return errors.Join(err, disk.WaitDetached(t.Context(), disk.LayerPath(r.config.StateDir, id)))
		},
		"no ids": func(t *testing.T, r *Runtime, id string) error {
			return errors.Join(endOnly(t, r, id), r.config.IDs.Release(id))
		},
		"a directory without a record": func(t *testing.T, r *Runtime, id string) error {
			return errors.Join(endOnly(t, r, id), r.config.IDs.Release(id), os.Remove(filepath.Join(r.dir(id), recordFile)))
		},
		"an empty directory": func(t *testing.T, r *Runtime, id string) error {
			return errors.Join(r.Release(t.Context(), id), os.Mkdir(r.dir(id), 0o700))
		},
		"half a record": func(t *testing.T, r *Runtime, id string) error {
			return errors.Join(r.Release(t.Context(), id), os.Mkdir(r.dir(id), 0o700),
				os.WriteFile(filepath.Join(r.dir(id), recordFile+".tmp"), []byte("{"), 0o600))
		},
		"processes and a record that nobody can read": func(_ *testing.T, r *Runtime, id string) error {
			return os.WriteFile(filepath.Join(r.dir(id), recordFile), []byte("{"), 0o600)
		},
		"an id range that could not be released": func(t *testing.T, r *Runtime, id string) error {
			ids := filepath.Join(filepath.Dir(r.config.RunDir), "ids")
			if err := os.Rename(ids, ids+".away"); err != nil {
				return err
			}
			if err := r.Release(t.Context(), id); err == nil {
				t.Error("Release worked without the id ranges: this test tests nothing")
			}
			return os.Rename(ids+".away", ids)
		},
		"a directory that could not be removed": func(t *testing.T, r *Runtime, id string) error {
			busy := filepath.Join(r.dir(id), "busy")
			if err := errors.Join(os.Mkdir(busy, 0o700), unix.Mount("tmpfs", busy, "tmpfs", 0, "size=4k")); err != nil {
				return err
			}
			if err := r.Release(t.Context(), id); err == nil {
				t.Error("Release removed a mount point: this test tests nothing")
			}
			return unix.Unmount(busy, 0)
		},
	} {
		for _, sameDaemon := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, same daemon %v", name, sameDaemon), func(t *testing.T) {
				h := newHost(t)
				s := h.sandbox(1)
				r := h.daemon(t)
				want(t, mustStart(t, r, s), "echo kept >/f; echo ok", "ok")
				if !sameDaemon {
					if err := r.Close(); err != nil {
						t.Fatal(err)
					}
					reapLater(t)
				}
				if err := left(t, r, s.ID); err != nil {
					t.Fatal(err)
				}
				if !sameDaemon {
					r = h.daemon(t)
				}
				if ids, err := r.List(t.Context()); err != nil || !slices.Equal(ids, []string{s.ID}) {
					t.Errorf("List = %v, %v", ids, err)
				}
				if _, err := r.Start(t.Context(), s); spec.KindOf(err) != spec.KindAlreadyExists {
					t.Errorf("Start before Release = %v, want KindAlreadyExists", err)
				}
				for range 2 {
					if err := r.Release(t.Context(), s.ID); err != nil {
						t.Errorf("Release: %v", err)
					}
				}
				want(t, mustStart(t, r, s), "cat /f", "kept")
				mustRemove(t, r, s.ID)
			})
		}
	}
}

// endOnly is the part of a teardown that ends the processes.
func endOnly(t *testing.T, r *Runtime, id string) error {
	return r.end(t.Context(), "", r.config.CgroupParent, id, id)
}

// reapLater reaps what a daemon's end left to this process, when the test is over.
func reapLater(t *testing.T) {
	t.Cleanup(func() { reap(t) })
}

// A process that does not end in time is still the instance's to wait for when somebody tries again.
func TestFailedTeardownKeepsTheInstance(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	id := h.sandbox(1).ID
	stuck := &instance{done: make(chan struct{})}
	r.instances[id] = stuck
	defer delete(r.instances, id) // it has nothing to give back
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := r.end(ctx, "", h.config.CgroupParent, id, id); !errors.Is(err, context.Canceled) {
		t.Errorf("the end of a process that does not end = %v", err)
	}
	if r.instance(id) != stuck {
		t.Error("the instance is forgotten")
	}
}
