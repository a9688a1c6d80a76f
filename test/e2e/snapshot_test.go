package e2e

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

// countingScript counts in its own memory, writes each number to an open file that was deleted, and has a child that listens on a
// Unix socket, /dev/log. Told by /exit it ends with a code of its own.
const countingScript = `
echo 0123456789abcdef0123456789abcdef >/etc/machine-id
exec 7>/deleted 8</deleted; rm /deleted
syslogd -O /heard
n=0
echo "begun as $$"
while [ ! -e /exit ]; do
	n=$((n+1)); echo $n >&7; echo $n >/count; sleep 0.2
done
set -- $(cat <&8); echo "ended at $n after $# lines"; exit 9
`

func count(t *testing.T, w harness.Wall, id string) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(w.Exec(id, "cat", "/count").Run().Stdout))
	if err != nil {
		t.Fatalf("workload %s has no count: %v", id, err)
	}
	return n
}

// identity is what must be a workload's own.
var identity = [][]string{
	{"hostname"}, {"cat", "/etc/hostname"}, {"cat", "/etc/machine-id"},
	{"cat", "/proc/sys/kernel/random/uuid"},
	{"sh", "-c", "head -c 65536 /dev/urandom | sha256sum"},
}

// TestSnapshot: what goes on from a snapshot, or is forked, is where its parent was, is somebody else, and ends by itself; the
// parent goes on.
func TestSnapshot(t *testing.T) {
	d := harness.OwnDaemon(t)
	d.Watch(t)
	w := d.Wall("vm")
	parent := w.Start(t, "--snapshots", "--memory", "256m", busybox, "sh", "-c", countingScript)
	d.WaitForLog(t, parent, "begun as")
	harness.Eventually(t, harness.LogTimeout, "it counts", func() (bool, string) {
		r := w.Exec(parent, "cat", "/count").Run()
		return r.Code == 0 && strings.TrimSpace(r.Stdout) != "", r.Stderr
	})
	atLeast := count(t, w, parent)
	snapshot := strings.TrimSpace(d.Call(t, "snapshot", "create", "--name", "first", parent).Stdout)
	atMost := count(t, w, parent)
	var listed []struct {
		ID          string `json:"id"`
		Name        string `json:"name"`
		WorkloadID  string `json:"workloadId"`
		Pause       string `json:"pause"`
		MemoryBytes string `json:"memoryBytes"`
	}
	must(t, json.Unmarshal([]byte(d.Call(t, "snapshot", "ls", "--format", "json").Stdout), &listed))
	if len(listed) != 1 || listed[0].ID != snapshot || listed[0].Name != "first" || listed[0].WorkloadID != parent {
		t.Fatalf("listed: %+v", listed)
	}
	t.Logf("of 256 MiB %s bytes are kept, the parent stood still for %s", listed[0].MemoryBytes, listed[0].Pause)
	wantPrivate(t, filepath.Join(d.StateDir, "snapshots"))

	var made []string
	for range 2 {
		made = append(made, strings.TrimSpace(d.Call(t, "restore", "first").Stdout))
		// It counts on, and one that began anew would be far behind.
		id := made[len(made)-1]
		if n := count(t, w, id); n < atLeast || n > atMost+1000 {
			t.Errorf("it is at %d, and its parent was between %d and %d", n, atLeast, atMost)
		}
		if s := d.Inspect(t, id).Status; s.StartedFrom != "snapshot" {
			t.Errorf("it started from %q", s.StartedFrom)
		}
	}
	forked := strings.TrimSpace(d.Call(t, "fork", "--name", "forked", "--hostname", "other", "-l", "kind=fork", "--idempotency-key", "k", parent).Stdout)
	if again := strings.TrimSpace(d.Call(t, "fork", "--name", "forked", "--hostname", "other", "-l", "kind=fork", "--idempotency-key", "k", parent).Stdout); again != forked {
		t.Errorf("a retry made %s beside %s", again, forked)
	}
	d.Call(t, "ps", "-q", "--filter", "label=kind=fork").WantOut(t, forked+"\n")
	made = append(made, forked)
	w.Exec(forked, "hostname").Run().WantOut(t, "other\n")
	all := append([]string{parent}, made...)
	for _, own := range identity {
		seen := map[string]string{}
		for _, id := range all {
			r := w.Exec(id, own...).Run()
			r.Want(t, 0)
			if other := seen[r.Stdout]; other != "" {
				t.Errorf("%q says the same in %s and %s: %s", own, other, id, r.Stdout)
			}
			seen[r.Stdout] = id
		}
	}
	for _, id := range all {
		before := count(t, w, id)
		harness.Eventually(t, harness.LogTimeout, "it counts on", func() (bool, string) {
			n := count(t, w, id)
			return n > before, fmt.Sprint(n)
		})
	}
	for _, id := range all {
		w.Exec(id, "logger", "to "+id).Run().Want(t, 0)
		harness.Eventually(t, harness.LogTimeout, "its socket is listened on", func() (bool, string) {
			heard := w.Exec(id, "cat", "/heard").Run().Stdout
			return strings.Contains(heard, "to "+id) && strings.Count(heard, "to ") == 1, heard
		})
	}
	// What ran before goes on, under the next daemon too.
	must(t, d.Kill())
	d.MustStart(t)
	d.Call(t, "snapshot", "rm", "first")
	d.Call(t, "snapshot", "ls", "-q").WantOut(t, "")
	for _, id := range all {
		w.Exec(id, "touch", "/exit").Run().Want(t, 0)
		d.Command("wait", id).Run().WantOut(t, "9\n")
		logs := d.Call(t, "logs", id).Stdout
		var at, lines int
		if _, err := fmt.Sscanf(logs[strings.Index(logs, "ended"):], "ended at %d after %d lines", &at, &lines); err != nil || at != lines || at < atLeast {
			t.Errorf("%s says %q: its open file has not what it counted (%v)", id, logs, err)
		}
		if begun := strings.Contains(logs, "begun"); begun != (id == parent) {
			t.Errorf("the log of %s has what was said before it was: %q", id, logs)
		}
	}
	d.Call(t, append([]string{"rm"}, all...)...)
	if left, err := os.ReadDir(filepath.Join(d.StateDir, "snapshots")); err != nil || len(left) > 0 {
		t.Errorf("left of snapshots: %v, %v", left, err)
	}
}

// wantPrivate: what was in a workload's memory is for nobody but the daemon.
func wantPrivate(t *testing.T, dir string) {
	t.Helper()
	files := 0
	must(t, filepath.Walk(dir, func(path string, info os.FileInfo, err error) error {
		if err == nil && info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, info.Mode())
		}
		files++
		return err
	}))
	if files < 5 {
		t.Errorf("%d files of a snapshot were looked at", files)
	}
}

// TestSnapshotIsRefused: what has no snapshots says why and runs on; one that is damaged leaves nothing of what was to go on from it.
func TestSnapshotIsRefused(t *testing.T) {
	d := harness.OwnDaemon(t)
	d.Watch(t)
	c, vm := d.Wall("container"), d.Wall("vm")
	plain, inVM := c.Start(t, busybox, "sleep", "600"), vm.Start(t, busybox, "sleep", "600")
	d.Command("snapshot", "create", plain).Run().WantError(t, 125, "container isolation has none")
	d.Command("fork", plain).Run().WantError(t, 125, "container isolation has none")
	d.Command("snapshot", "create", inVM).Run().WantError(t, 125, "create it with --snapshots")
	c.Run("--snapshots", busybox, "true").Run().WantError(t, 125, "--isolation vm")
	d.Command("restore", "nobody").Run().WantError(t, 125, "no snapshot")
	c.Exec(plain, "true").Run().Want(t, 0)
	vm.Exec(inVM, "true").Run().Want(t, 0)
	d.Call(t, "rm", "--force", plain, inVM)

	parent := vm.Start(t, "--snapshots", "--label", "tenant=a", busybox, "sleep", "600")
	snapshot := strings.TrimSpace(d.Call(t, "snapshot", "create", parent).Stdout)
	d.Command("restore", "--label", "tenant=b", snapshot).Run().WantError(t, 125, "tenant")
	state := filepath.Join(d.StateDir, "snapshots", snapshot, "data", "state")
	f, err := os.OpenFile(state, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt([]byte("damaged"), 4096)
	must(t, err)
	must(t, f.Close())
	d.Command("restore", "--name", "again", snapshot).Run().WantError(t, 125, "damaged")
	d.Call(t, "ps", "-a", "-q").WantOut(t, parent+"\n")
	vm.Exec(parent, "true").Run().Want(t, 0)
	d.Call(t, "rm", "--force", parent)
	d.Command("image", "rm", busybox).Run().WantError(t, 125, "snapshot uses it")
	d.Call(t, "snapshot", "rm", snapshot)
	d.Call(t, "image", "rm", busybox)
}
