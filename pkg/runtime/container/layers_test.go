package container

import (
	"errors"
	"io/fs"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/disk"
)

// spares waits until none of the layers of removed sandboxes is on its way any more, and answers with those that are spare.
func spares(t *testing.T, r *Runtime) []*layer {
	t.Helper()
	for deadline := time.Now().Add(quietTimeout); ; time.Sleep(time.Millisecond) {
		r.layers.mu.Lock()
		s := slices.Clone(r.layers.spares)
		r.layers.mu.Unlock()
		dirs, err := os.ReadDir(r.layers.spareDir())
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if len(dirs) == len(s) {
			return s
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d layers lie there and %d are spare", len(dirs), len(s))
		}
	}
}

// What a sandbox left in its layer is in no way seen by the next that gets the layer's file system.
func TestSpareLayerIsLikeNew(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	const look = "ls -lanR / 2>/dev/null | grep -v -e ^/proc -e ^/sys | grep -c mark; cat /etc/motd; stat -c %u:%g:%a /; ls -an /root /tmp | wc -l; df -k / | tail -1"
	i := mustStart(t, r, h.sandbox(1))
	fresh, _ := sh(t, i, look)
	if _, code := sh(t, i, "echo secret >/mark; mkdir -p /deep/mark/mark; ln -s /etc/motd /deep/mark/link; echo changed >/etc/motd; rm -rf /root; chmod 700 /; chown 5:6 /"); code != 0 {
		t.Fatalf("the sandbox could not leave its marks: %d", code)
	}
	mustRemove(t, r, h.sandbox(1).ID)
	left := spares(t, r)
	if len(left) != 1 {
		t.Fatalf("%d layers are spare", len(left))
	}
	if ids, err := r.List(t.Context()); err != nil || len(ids) != 0 {
		t.Errorf("List with a spare layer = %v, %v", ids, err)
	}
	i = mustStart(t, r, h.sandbox(2))
	if got := left[0]; got.dir != layerDir(h.config.StateDir, h.sandbox(2).ID) || len(spareNow(r)) != 0 {
		t.Errorf("the spare layer is in %s: this test tests nothing", got.dir)
	}
	if again, _ := sh(t, i, look); again != fresh {
		t.Errorf("the second sandbox sees\n%sthe first saw\n%s", again, fresh)
	}
	mustRemove(t, r, h.sandbox(2).ID)
}

func spareNow(r *Runtime) []*layer {
	r.layers.mu.Lock()
	defer r.layers.mu.Unlock()
	return r.layers.spares
}

// A layer that was much used is not used again, nor one that was kept, nor one of another size; and of none is anything left when
// the daemon ends.
func TestSpareLayersAreFew(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	for name, script := range map[string]string{
		"many files":  "for i in $(seq 100); do >/f$i; done",
		"many bytes":  "for i in 1 2 3 4; do cat /bin/sh; done >/f",
		"a deep tree": "d=/; for i in $(seq 100); do d=$d/d; mkdir $d; done",
	} {
		i := mustStart(t, r, h.sandbox(1))
		if _, code := sh(t, i, script); code != 0 {
			t.Errorf("%s: %d", name, code)
		}
		r.layers.mu.Lock()
		mount := r.layers.mounted[h.sandbox(1).ID].mount
		r.layers.mu.Unlock()
		top, err := os.Open(fdPath(mount))
		if err == nil {
			err = errors.Join(unix.Syncfs(int(top.Fd())), top.Close()) // as the kernel does by itself, some time
		}
		if err != nil {
			t.Error(err)
		}
		mustRemove(t, r, h.sandbox(1).ID)
		if left := spares(t, r); len(left) != 0 {
			t.Errorf("%s: the layer is spare", name)
		}
	}
	mustStart(t, r, h.sandbox(1))
	if err := r.layers.setDirect(h.sandbox(1).ID, true); err != nil {
		t.Fatal(err)
	}
	mustRemove(t, r, h.sandbox(1).ID)
	if left := spares(t, r); len(left) != 0 {
		t.Error("a layer that is written to directly is spare")
	}
	mustStart(t, r, h.sandbox(1))
	mustRemove(t, r, h.sandbox(1).ID)
	if left := spares(t, r); len(left) != 1 {
		t.Fatalf("%d layers are spare", len(left))
	}
	other := h.sandbox(2)
	other.Resources.DiskBytes *= 2
	i := mustStart(t, r, other)
	if len(spareNow(r)) != 1 {
		t.Error("a layer of another size was taken")
	}
	if u, err := i.Usage(); err != nil || u.DiskLimitBytes != other.Resources.DiskBytes {
		t.Errorf("the layer has %d bytes, %v", u.DiskLimitBytes, err)
	}
	if err := r.Release(t.Context(), other.ID); err != nil {
		t.Fatal(err)
	}
	waitDone(t, i)
	// Kept: it is unmounted for good a moment later.
	if err := disk.WaitDetached(t.Context(), disk.LayerPath(h.config.StateDir, other.ID)); err != nil {
		t.Error(err)
	}
	mustRemove(t, r, other.ID)
	for n := range maxSpares + 3 {
		mustStart(t, r, h.sandbox(n))
	}
	for n := range maxSpares + 3 {
		mustRemove(t, r, h.sandbox(n).ID)
	}
	if left := spares(t, r); len(left) > maxSpares {
		t.Errorf("%d layers are spare, more than %d", len(left), maxSpares)
	}
	// newHost looks at what is left when the daemon is closed.
}

// A daemon that dies leaves its spares to the next one.
func TestNextDaemonClearsSpareLayers(t *testing.T) {
	h := newHost(t)
	r := h.daemon(t)
	mustStart(t, r, h.sandbox(1))
	mustRemove(t, r, h.sandbox(1).ID)
	left := spares(t, r)
	if len(left) != 1 {
		t.Fatalf("%d layers are spare", len(left))
	}
	r.layers.mu.Lock() // as of a daemon that was killed: it has nothing mounted, and did nothing about it
	r.layers.spares = nil
	left[0].timer.Stop()
	left[0].close()
	r.layers.mu.Unlock()
	if _, err := os.Stat(left[0].file()); err != nil {
		t.Errorf("%v: this test tests nothing", err)
	}
	next := h.daemon(t)
	if ids, err := next.List(t.Context()); err != nil || len(ids) != 0 {
		t.Errorf("the next daemon lists %v, %v", ids, err)
	}
	if _, err := os.Stat(left[0].file()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the spare layer is there yet: %v", err)
	}
}
