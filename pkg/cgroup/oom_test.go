package cgroup

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Who may not protect a process (no CAP_SYS_RESOURCE) cannot show the kernel's part of it; a file stands for it then.
func TestDropOOMProtection(t *testing.T) {
	for was, want := range map[string]string{"-1000": "0", "-500": "0", "0": "0", "300": "300"} {
		file := filepath.Join(t.TempDir(), "oom_score_adj")
		if err := os.WriteFile(file, []byte(was+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := dropOOMProtection(file); err != nil {
			t.Error(err)
		}
		if got := oomScore(t, file); got != want {
			t.Errorf("of %s it made %s, want %s", was, got, want)
		}

		cmd := exec.CommandContext(t.Context(), "sleep", "300")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		file = fmt.Sprintf("/proc/%d/oom_score_adj", cmd.Process.Pid)
		err := os.WriteFile(file, []byte(was), 0)
		if err != nil && !errors.Is(err, unix.EACCES) {
			t.Error(err)
		}
		if err != nil {
			want = oomScore(t, file) // as it was
		}
		if err := DropOOMProtection(cmd.Process.Pid); err != nil {
			t.Error(err)
		}
		if got := oomScore(t, file); got != want {
			t.Errorf("of a process with %s it made one with %s, want %s", was, got, want)
		}
		_ = cmd.Process.Kill() // ours
		_ = cmd.Wait()         // killed
		if err := DropOOMProtection(cmd.Process.Pid); err == nil {
			t.Error("a process that is gone was found")
		}
	}
}

func oomScore(t *testing.T, file string) string {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(b))
}
