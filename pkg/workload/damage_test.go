package workload

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// A journal that is damaged where whole changes follow keeps all of those, whichever bit it is, and the damaged one stays to be
// looked at.
func TestStoreKeepsWhatFollowsDamage(t *testing.T) {
	whole := t.TempDir()
	s := reopen(t, whole)
	put(t, s, "a", 1)
	begin := s.journal.size
	put(t, s, "lost", 1)
	end := s.journal.size
	put(t, s, "b", 1)
	put(t, s, "a", 2)
	die(s)
	content, err := os.ReadFile(filepath.Join(whole, journalFile))
	if err != nil {
		t.Fatal(err)
	}
	damages := map[string][]byte{
		"zeros":   slices.Concat(content[:begin], make([]byte, end-begin), content[end:]),
		"missing": slices.Concat(content[:begin+9], content[end:]),
	}
	for at := begin; at < end; at += 5 {
		for _, bit := range []byte{1, 0x80} {
			damages[fmt.Sprintf("bit %#x flipped at %d", bit, at)] = slices.Concat(content[:at], []byte{content[at] ^ bit}, content[at+1:])
		}
	}
	for what, damaged := range damages {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, journalFile), damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		for range 2 { // the second time it is whole
			s := reopen(t, dir)
			if got, want := names(t, s), []string{"a 2", "b 1"}; !slices.Equal(got, want) {
				t.Fatalf("%s: %v, want %v", what, got, want)
			}
			copies, err := s.damaged()
			if err != nil || len(copies) != 1 {
				t.Fatalf("%s: copies %q, %v", what, copies, err)
			}
			if kept, err := os.ReadFile(copies[0]); err != nil || !bytes.Equal(kept, damaged) {
				t.Fatalf("%s: the copy is not what was there: %v", what, err)
			}
			die(s)
		}
	}
}

// What the head of the journal must be, and what is refused: nothing of it may be taken for no workloads at all.
func TestForeignJournalsAreRefused(t *testing.T) {
	for what, content := range map[string]string{
		"empty":                "",
		"shorter than a head":  journalMagic[:7],
		"of another version":   strings.Replace(journalMagic, "2", "3", 1),
		"a bit of its head":    "S" + journalMagic[1:],
		"something else":       strings.Repeat("SQLite format 3\x00", 64),
		"no JSON, but summed":  "",
		"zeros where the head": strings.Repeat("\x00", 4096),
	} {
		dir := t.TempDir()
		path := filepath.Join(dir, journalFile)
		if what == "no JSON, but summed" {
			s := reopen(t, dir)
			if _, err := s.journal.append([]byte("not JSON")); err != nil {
				t.Fatal(err)
			}
			die(s)
		} else if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		before, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := openStore(dir); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("%s: opened with %v", what, err)
		}
		if after, err := os.ReadFile(path); err != nil || !bytes.Equal(before, after) {
			t.Errorf("%s: it was changed: %v", what, err)
		}
	}
}

// While a damaged journal's copy is there, a sandbox without a record may be of a workload whose record is lost.
func TestRecoverKeepsStraysBesideDamage(t *testing.T) {
	h := newHost(t)
	stray := strings.Repeat("5", 32)
	if _, err := h.rt.Runtime.Start(h.ctx(), spec.Sandbox{ID: stray, ImagePath: h.images["busybox"].Path, Resources: DefaultResources}); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(h.dir, "state/workloads")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := reopen(t, dir)
	put(t, s, "a", 1)
	at := s.journal.size - 3
	if _, err := s.delete("a"); err != nil {
		t.Fatal(err)
	}
	if _, err := s.journal.file.WriteAt([]byte{0xff}, at); err != nil {
		t.Fatal(err)
	}
	die(s)
	m := h.open()
	if left := h.sandboxes(); len(left) != 1 {
		t.Fatalf("beside a damaged journal, a sandbox without a record was removed: there are %v", left)
	}
	copies, err := m.store.damaged()
	if err != nil || len(copies) != 1 {
		t.Fatalf("copies %q, %v", copies, err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(copies[0]); err != nil {
		t.Fatal(err)
	}
	h.boot()
	if left := h.sandboxes(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
}

// Why a workload no longer runs: the daemon came back, or the host did.
func TestRecoverTellsARebootFromARestart(t *testing.T) {
	for boot, want := range map[string]string{
		"":                                     "its sandbox was gone when sandboxd came back",
		"00000000-0000-4000-8000-000000000000": "the host was booted again while it ran: start it again",
	} {
		h := newHost(t)
		m := h.open()
		id := h.start(m, "cat")
		e, err := m.find(id)
		if err != nil {
			t.Fatal(err)
		}
		rec, r, _ := e.peek()
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		if err := r.inst.Kill(); err != nil {
			t.Fatal(err)
		}
		<-r.inst.Done()
		if rec.Boot == "" {
			t.Fatal("the record has no boot id")
		}
		if boot != "" {
			rec.Boot = boot
		}
		st, err := openStore(filepath.Join(h.dir, "state/workloads"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := st.put(&rec); err != nil {
			t.Fatal(err)
		}
		if err := st.close(); err != nil {
			t.Fatal(err)
		}
		w, err := h.boot().Get(id)
		if err != nil || w.Status.State != StateFailed || w.Status.Message != want {
			t.Errorf("%s, %q, %v, want %q", w.Status.State, w.Status.Message, err, want)
		}
	}
}

// A journal that cannot be written anew takes no room.
func TestJournalLeavesNoHalf(t *testing.T) {
	dir := t.TempDir()
	s := reopen(t, dir)
	put(t, s, "a", 1)
	gone := map[string]places{"a": {record: place{at: 1 << 40, length: 1 << 10}}}
	if next, _, err := s.journal.rewrite(s.path(), gone); err == nil || next != nil {
		t.Fatalf("written anew from what is not there: %v", err)
	}
	if left, err := filepath.Glob(s.path() + ".*"); err != nil || len(left) > 0 {
		t.Errorf("left: %q, %v", left, err)
	}
	if got := names(t, s); !slices.Equal(got, []string{"a 1"}) {
		t.Errorf("%v", got)
	}
}

// damageRecord flips a bit in every change of a workload's, whole ones of others between them, as a failing disk may.
func damageRecord(t *testing.T, dir, id string) {
	t.Helper()
	path := filepath.Join(dir, journalFile)
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	mark := []byte(`{"id":"` + id + `"`)
	found := 0
	for at := 0; ; found++ {
		i := bytes.Index(content[at:], mark)
		if i < 0 {
			break
		}
		at += i + len(mark)
		content[at+1] ^= 1
	}
	if found == 0 {
		t.Fatal("the journal does not speak of it")
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

// Of a workload whose record is lost everything stays, until somebody removes it by its id.
func TestLostWorkloadIsRemovedByForce(t *testing.T) {
	h := newHost(t)
	m := h.open()
	id := h.start(m, "echo hello; exec sleep 1000")
	h.awaitOutput(m, id, "hello")
	kept := h.create(m, "true") // whole changes follow
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	damageRecord(t, m.dir, id)
	m = h.open()
	defer m.Close()
	if _, err := m.Get(id); spec.KindOf(err) != spec.KindNotFound {
		t.Fatalf("its record should be lost: %v", err)
	}
	if left := h.sandboxes(); len(left) != 1 {
		t.Fatalf("its sandbox is gone: %v", left)
	}
	for ref, force := range map[string]bool{id: false, id[:12]: true, "../" + id: true, strings.Repeat("0", 32): true} {
		if err := m.Delete(h.ctx(), ref, force); spec.KindOf(err) != spec.KindNotFound {
			t.Errorf("removal of %s, by force %v: %v", ref, force, err)
		}
	}
	if left := h.sandboxes(); len(left) != 1 {
		t.Fatalf("its sandbox is gone: %v", left)
	}
	h.rt.failRemoves(1)
	if err := m.Delete(h.ctx(), id, true); spec.KindOf(err) != spec.KindUnavailable {
		t.Errorf("a removal that fails: %v", err)
	}
	if err := m.Delete(h.ctx(), id, true); err != nil {
		t.Fatal(err)
	}
	wantGone(t, h, m, id)
	if _, err := m.Get(kept); err != nil {
		t.Errorf("the other workload: %v", err)
	}
	if err := m.Delete(h.ctx(), id, true); spec.KindOf(err) != spec.KindNotFound {
		t.Errorf("removed twice: %v", err)
	}
}

// A workload whose last changes are lost has an earlier state again. It can be removed by force, whatever runs of it.
func TestWorkloadOfAnEarlierStateIsRemovedByForce(t *testing.T) {
	for _, state := range []State{StateCreated, StateStarting, StateFailed} {
		h := newHost(t)
		m := h.open()
		id := h.start(m, "exec sleep 1000")
		e, err := m.find(id)
		if err != nil {
			t.Fatal(err)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
		st, err := openStore(m.dir)
		if err != nil {
			t.Fatal(err)
		}
		rec := e.rec
		rec.Status.State = state
		_, err = st.put(&rec)
		if err := errors.Join(err, st.close()); err != nil {
			t.Fatal(err)
		}
		m = h.boot()
		if err := m.Delete(h.ctx(), id, true); err != nil {
			t.Errorf("%s: %v", state, err)
		}
		wantGone(t, h, m, id)
	}
}
