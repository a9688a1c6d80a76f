package e2e

import (
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What a VM's kernel and QEMU say is kept with the workload, and a VM that is lost says why.
func TestConsole(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, busybox, "sleep", "600")
		if w.Isolation == "container" {
			w.Command("logs", "--console", id).Run().WantError(t, 125, "has no console")
			return
		}
		w.Command("logs", "--console", "-f", id).Run().WantError(t, 125, "cannot be followed")
		must(t, unix.Kill(w.Inspect(t, id).Status.HostPID, unix.SIGKILL))
		eventually(t, 30*time.Second, "its end is told", func() (bool, string) {
			status := w.Inspect(t, id).Status
			return status.State == "WORKLOAD_STATE_FAILED" && strings.Contains(status.Message, "QEMU was ended by signal 9"), status.State + ": " + status.Message
		})
		// A second life ends well, and both are in the log, which outlives the sandboxes.
		w.Call(t, "start", id)
		w.Call(t, "stop", "--grace", "0s", id)
		if out := w.Call(t, "logs", "--console", "--timestamps", id).Stdout; !strings.Contains(out, "reboot: Restarting system") {
			t.Errorf("the console says\n%s", abridged(out))
		}
	})
}
