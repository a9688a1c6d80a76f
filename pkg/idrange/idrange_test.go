package idrange

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

func TestRangesAreDisjointBetweenDaemonsAndFoundAgain(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ids")
	const daemons, each = 4, 50
	var mu sync.Mutex
	bases := map[uint32]string{}
	var wg sync.WaitGroup
	for d := range daemons {
		a, err := Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			for i := range each {
				owner := fmt.Sprintf("daemon%d-sandbox%d", d, i)
				base, err := a.Allocate(owner)
				if err != nil {
					t.Errorf("Allocate: %v", err)
					return
				}
				mu.Lock()
				if other, ok := bases[base]; ok {
					t.Errorf("%s and %s both got %d", owner, other, base)
				}
				bases[base] = owner
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if len(bases) != daemons*each {
		t.Fatalf("%d ranges, want %d", len(bases), daemons*each)
	}
	again, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for base, owner := range bases {
		if base%Size != 0 {
			t.Errorf("base %d is not aligned", base)
		}
		if got, err := again.Allocate(owner); err != nil || got != base {
			t.Errorf("Allocate(%s) again = %d, %v, want %d", owner, got, err, base)
		}
		for range 2 {
			if err := again.Release(owner); err != nil {
				t.Errorf("Release: %v", err)
			}
		}
		if _, err := again.Lookup(owner); spec.KindOf(err) != spec.KindNotFound {
			t.Errorf("Lookup after Release: %v, want KindNotFound", err)
		}
	}
	left, err := os.ReadDir(dir)
	if err != nil || len(left) != 0 {
		t.Errorf("%d files left, %v", len(left), err)
	}
}

func TestFullDirectoryIsExhausted(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	a, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint32(slots) {
		if err := os.Symlink("someone", a.path(firstBase+i*Size)); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := a.Allocate("late"); spec.KindOf(err) != spec.KindExhausted {
		t.Errorf("Allocate = %v, want KindExhausted", err)
	}
}

func TestOpenRefusesWhatOthersControl(t *testing.T) {
	dir := t.TempDir()
	if err := os.Symlink(t.TempDir(), filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(filepath.Join(dir, "link")); err == nil {
		t.Error("Open followed a symbolic link")
	}
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o777); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(open); err == nil {
		t.Error("Open took a directory that others may write to")
	}
	for _, owner := range []string{"", "../x", "a/b", ".hidden"} {
		a, err := Open(filepath.Join(dir, "ids"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := a.Allocate(owner); err == nil {
			t.Errorf("Allocate(%q) succeeded", owner)
		}
	}
}
