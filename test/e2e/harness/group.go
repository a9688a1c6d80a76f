package harness

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Group is the directory of a workload's cgroup, that of the controller where cgroup v1 has several. A test looks there for
// what the daemon should have made of it, or does what only the host's owner could.
func (d *Daemon) Group(t *testing.T, id, controller string) string {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", d.Inspect(t, id).Status.HostPID))
	Must(t, err)
	unified := ""
	for line := range strings.Lines(string(b)) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, path, _ := strings.Cut(rest, ":")
		for c := range strings.SplitSeq(controllers, ",") {
			if c == controller {
				return filepath.Join("/sys/fs/cgroup", controller, path)
			}
		}
		if controllers == "" {
			unified = path
		}
	}
	return filepath.Join("/sys/fs/cgroup", unified)
}
