package workload

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.uber.org/zap/zaptest"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func aSnapshot(id, name string) *snapshotRecord {
	return &snapshotRecord{
		Snapshot: Snapshot{ID: strings.Repeat(id, 32), Name: name, WorkloadID: strings.Repeat("f", 32), ImageDigest: "sha256:" + id, MemoryBytes: 100, DiskBytes: 10},
		Run:      1,
	}
}

// What a daemon that died left of snapshots is shown to nobody: what has no record is removed, what was being made and what was for a
// fork waits until its workload goes on, and a record that cannot be read stays for somebody to look at.
func TestSnapshotsAfterADeath(t *testing.T) {
	dir := t.TempDir()
	open := func() *snapshotStore {
		t.Helper()
		s, err := openSnapshots(dir, zaptest.NewLogger(t))
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	s := open()
	ready, making, forked := aSnapshot("a", "ready"), aSnapshot("b", "making"), aSnapshot("c", "forked")
	forked.Transient = true
	for _, r := range []*snapshotRecord{ready, making, forked} {
		if err := s.begin(r); err != nil {
			t.Fatal(err)
		}
		s.release(r)
	}
	for _, r := range []*snapshotRecord{ready, forked} {
		if err := s.finish(r); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.begin(aSnapshot("d", "ready")); spec.KindOf(err) != spec.KindAlreadyExists {
		t.Errorf("a second of one name: %v", err)
	}
	orphan, broken := filepath.Join(dir, strings.Repeat("d", 32)), filepath.Join(dir, strings.Repeat("e", 32))
	for _, path := range []string{orphan, broken} {
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(broken, snapshotRecordFile), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open()
	if got := s.list(nil); len(got) != 1 || got[0].Name != "ready" {
		t.Errorf("listed: %+v", got)
	}
	if got := s.interruptedOf(ready.WorkloadID); len(got) != 2 {
		t.Errorf("%d wait for their workload, want 2", len(got))
	}
	if _, err := os.Lstat(orphan); !os.IsNotExist(err) {
		t.Errorf("one without a record is there: %v", err)
	}
	if _, err := os.Lstat(broken); err != nil {
		t.Errorf("one with a damaged record is gone: %v", err)
	}
	for _, ref := range []string{"making", "forked", making.ID, strings.Repeat("e", 32)} {
		if _, err := s.hold(ref); spec.KindOf(err) != spec.KindNotFound {
			t.Errorf("%q is found: %v", ref, err)
		}
	}
	for _, r := range s.interruptedOf(ready.WorkloadID) {
		if err := s.drop(r); err != nil {
			t.Fatal(err)
		}
	}
	if !s.uses(ready.ImageDigest) || s.uses(making.ImageDigest) {
		t.Error("the images of snapshots are not those that are kept")
	}
	held, err := s.hold("aaaa")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.delete("ready"); spec.KindOf(err) != spec.KindWrongState {
		t.Errorf("one that is in use is removed: %v", err)
	}
	s.release(held)
	if err := s.delete("ready"); err != nil {
		t.Error(err)
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// A runtime whose sandboxes cannot be copied says so, before anything is made.
func TestContainersHaveNoSnapshots(t *testing.T) {
	h := newHost(t)
	m := h.boot()
	id := h.start(m, "read x; exit 0")
	if _, err := m.CreateSnapshot(h.ctx(), id, CreateSnapshotOptions{}); spec.KindOf(err) != spec.KindUnsupported {
		t.Errorf("a snapshot: %v", err)
	}
	if _, err := m.Fork(h.ctx(), id, RestoreOptions{}); spec.KindOf(err) != spec.KindUnsupported {
		t.Errorf("a fork: %v", err)
	}
	if _, err := m.RestoreSnapshot(h.ctx(), "nobody", RestoreOptions{}); spec.KindOf(err) != spec.KindNotFound {
		t.Errorf("a restore: %v", err)
	}
	if _, err := m.Create(h.ctx(), CreateOptions{Spec: spec.Workload{Image: "busybox", Isolation: spec.IsolationContainer, Snapshots: true}}); spec.KindOf(err) != spec.KindUnsupported {
		t.Errorf("a container that is to have snapshots: %v", err)
	}
	if h.state(m, id) != StateRunning {
		t.Errorf("it is %s", h.state(m, id))
	}
}

// FuzzSnapshotRecord: a record that is accepted names a snapshot.
func FuzzSnapshotRecord(f *testing.F) {
	b, _ := json.Marshal(aSnapshot("a", "n"))
	f.Add(b)
	f.Add([]byte(`{"id":"../../etc","run":1}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s, err := parseSnapshotRecord(b); err == nil && (!snapshotID.MatchString(s.ID) || s.Run < 1) {
			t.Errorf("accepted %+v", s)
		}
	})
}
