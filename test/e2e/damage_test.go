package e2e

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
)

// Whatever becomes of a file of the daemon's own: it starts or says which file it cannot use, and nothing that runs is lost.
func TestDamagedState(t *testing.T) {
	d := ownDaemon(t)
	d.Watch(t)
	ids, pids := map[string]string{}, map[string]int{}
	for _, iso := range isolations {
		ids[iso] = d.Wall(iso).Start(t, busybox, "sleep", "100000")
		pids[iso] = d.Inspect(t, ids[iso]).Status.HostPID
	}
	must(t, d.Terminate())
	var files []string
	for _, dir := range []string{d.StateDir, d.RunDir} {
		must(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			info, statErr := os.Lstat(path)
			// Images, kernels and layers are content, not records.
			if err == nil && statErr == nil && e.Type().IsRegular() && info.Size() > 0 && info.Size() < 1<<20 {
				files = append(files, path)
			}
			return nil
		}))
	}
	t.Logf("files of state: %s", strings.Join(files, "\n\t"))
	if len(files) < 3 {
		t.Fatalf("only %q", files)
	}
	refused, repaired := 0, 0
	for _, path := range files {
		whole, err := os.ReadFile(path)
		must(t, err)
		flipped := slices.Clone(whole)
		flipped[len(bytes.TrimRight(whole, "\x00"))/2] ^= 0x10
		for what, b := range map[string][]byte{"cut off": whole[:len(whole)/2], "flipped": flipped, "empty": {}, "foreign": []byte("SQLite format 3\x00")} {
			must(t, os.WriteFile(path, b, 0o600))
			if err := d.Start(); err != nil {
				lines := strings.Split(strings.TrimSpace(err.Error()), "\n")
				if last := lines[len(lines)-1]; !strings.HasPrefix(last, "sandboxd: cannot ") || !strings.Contains(last, path) {
					t.Errorf("%s, %s: it does not say what it cannot use: %v", path, what, err)
				}
				refused++
			}
			for _, iso := range isolations {
				if err := syscall.Kill(pids[iso], 0); err != nil {
					t.Fatalf("%s, %s: what ran in a %s is gone: %v", path, what, iso, err)
				}
			}
			must(t, d.Terminate())
			copies, err := filepath.Glob(path + ".damaged-*")
			must(t, err)
			repaired += len(copies)
			for _, c := range append(copies, path) {
				must(t, os.RemoveAll(c))
			}
			must(t, os.WriteFile(path, whole, 0o600))
		}
	}
	t.Logf("%d files, each damaged in 4 ways: %d refused, %d repaired with a copy", len(files), refused, repaired)
	if refused == 0 || repaired == 0 {
		t.Error("the damages were not seen")
	}
	d.MustStart(t)
	for _, iso := range isolations {
		if s := d.Inspect(t, ids[iso]).Status; s.State != "WORKLOAD_STATE_RUNNING" || s.HostPID != pids[iso] {
			t.Errorf("in a %s, with all put back: %+v", iso, s)
		}
		d.Call(t, "exec", ids[iso], "echo", "here").WantOut(t, "here\n")
	}
}
