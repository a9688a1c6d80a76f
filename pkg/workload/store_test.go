package workload

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
)

func reopen(t *testing.T, dir string) *store {
	t.Helper()
	s, err := openStore(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.lock.Close() })
	return s
}

// names are the workloads in a store, each with its count of starts.
func names(t *testing.T, s *store) []string {
	t.Helper()
	records, err := s.all()
	if err != nil {
		t.Fatal(err)
	}
	out := []string{}
	for _, r := range records {
		out = append(out, fmt.Sprintf("%s %d", r.ID, r.Run))
	}
	slices.Sort(out)
	return out
}

func put(t *testing.T, s *store, id string, run int) {
	t.Helper()
	if _, err := s.put(&record{Workload: Workload{ID: id}, Run: run}); err != nil {
		t.Fatal(err)
	}
}

// die leaves a store as its daemon's death does: written, not synced, not closed.
func die(s *store) {
	_ = s.journal.close()
	_ = s.lock.Close()
}

func TestStoreKeepsWhatWasWrittenWhenItsDaemonDies(t *testing.T) {
	dir := t.TempDir()
	s := reopen(t, dir)
	put(t, s, "a", 1)
	put(t, s, "b", 1)
	put(t, s, "a", 2)
	put(t, s, "c", 1)
	if _, err := s.delete("b"); err != nil {
		t.Fatal(err)
	}
	die(s)
	if got, want := names(t, reopen(t, dir)), []string{"a 2", "c 1"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// Whatever is left of a change that was being written: those before it count, and what is written over it counts.
func TestStoreCutsOffAHalfWrittenChange(t *testing.T) {
	whole := t.TempDir()
	s := reopen(t, whole)
	put(t, s, "a", 1)
	begin := s.journal.size
	put(t, s, strings.Repeat("long", 64), 1)
	end := s.journal.size
	die(s)
	content, err := os.ReadFile(filepath.Join(whole, journalFile))
	if err != nil {
		t.Fatal(err)
	}
	for cut := begin; cut < end; cut += 7 {
		for kind, torn := range map[string][]byte{
			"cut off":               content[:cut],
			"zeros from there on":   append(slices.Clone(content[:cut]), make([]byte, 4096)...),
			"zeros up to there":     slices.Concat(content[:begin], make([]byte, cut-begin), content[cut:]),
			"damaged in the middle": slices.Concat(content[:cut], []byte{content[cut] ^ 0x55}, content[cut+1:]),
		} {
			if kind == "zeros up to there" && cut == begin {
				continue // nothing is missing
			}
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, journalFile), torn, 0o600); err != nil {
				t.Fatal(err)
			}
			s := reopen(t, dir)
			if got := names(t, s); !slices.Equal(got, []string{"a 1"}) {
				t.Fatalf("%s at %d: %v", kind, cut, got)
			}
			put(t, s, "b", 1)
			die(s)
			s = reopen(t, dir)
			if got := names(t, s); !slices.Equal(got, []string{"a 1", "b 1"}) {
				t.Fatalf("%s at %d, and one more: %v", kind, cut, got)
			}
			die(s)
		}
	}
}

func TestStoreIsWrittenAnewAndStaysSmall(t *testing.T) {
	dir := t.TempDir()
	s := reopen(t, dir)
	if _, err := s.put(&record{Workload: Workload{ID: "kept"}, Run: 6, config: []byte(`{"its":"config"}`)}); err != nil {
		t.Fatal(err)
	}
	put(t, s, "kept", 7)
	padding := strings.Repeat("x", 4<<10)
	for i := range 6000 {
		if _, err := s.put(&record{Workload: Workload{ID: "busy", Name: padding}, Run: i}); err != nil {
			t.Fatal(err)
		}
	}
	if s.journal.size > 2*compactMin {
		t.Errorf("the journal has %d bytes for two records", s.journal.size)
	}
	die(s)
	s = reopen(t, dir)
	if config, err := s.config("kept"); string(config) != `{"its":"config"}` || err != nil {
		t.Errorf("its configuration is %q, %v", config, err)
	}
	if got, want := names(t, s), []string{"busy 5999", "kept 7"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestStoreSyncsForManyAtOnce(t *testing.T) {
	s := reopen(t, t.TempDir())
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			for run := range 20 {
				change, err := s.put(&record{Workload: Workload{ID: fmt.Sprint(i), Name: strings.Repeat("x", 1<<10)}, Run: run})
				if err == nil {
					err = s.sync(change)
				}
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if got := len(names(t, s)); got != 64 {
		t.Errorf("%d records, want 64", got)
	}
	if err := s.close(); err != nil {
		t.Error(err)
	}
}
