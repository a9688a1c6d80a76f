package e2e

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A counter that runs while its daemon dies: every number must be in the logs, once, in order.
const counterScript = `i=0; while [ ! -e /stop ]; do echo $i; i=$((i+1)); sleep 0.05; done; echo end $i; exit 9`

// wantCounted fails the test unless out is every number from 0 on, and how many they were.
func wantCounted(t *testing.T, out string) {
	t.Helper()
	lines := strings.Split(strings.TrimSuffix(out, "\n"), "\n")
	last := len(lines) - 1
	for i, l := range lines[:last] {
		if l != fmt.Sprint(i) {
			t.Fatalf("line %d of %d is %q", i+1, len(lines), l)
		}
	}
	if lines[last] != fmt.Sprintf("end %d", last) {
		t.Errorf("%d numbers, and then %q", last, lines[last])
	}
}

// While the daemon is away or back again, workloads of both kinds go on and nothing of them is lost.
func TestDaemonComesBack(t *testing.T) {
	for _, c := range []struct {
		what string
		end  func(d *daemon) error
	}{
		{"killed", (*daemon).Kill},
		{"terminated", (*daemon).Terminate},
	} {
		t.Run(c.what, func(t *testing.T) {
			d := ownDaemon(t)
			d.Watch(t)
			counters, quitters, sleepers := map[string]string{}, map[string]string{}, map[string]string{}
			for _, iso := range isolations {
				w := d.Wall(iso)
				counters[iso] = w.Start(t, busybox, "sh", "-c", counterScript)
				// Ends on its own while nobody looks.
				quitters[iso] = w.Start(t, busybox, "sh", "-c", "echo here; while [ ! -e /go ]; do sleep 0.1; done; sleep 1; echo gone; exit 6")
				sleepers[iso] = w.Start(t, "-i", busybox, "sh", "-c", "while read l; do echo got $l; done; exit 8")
			}
			pids := map[string]int{}
			for _, iso := range isolations {
				d.WaitForLog(t, counters[iso], "5\n")
				d.Call(t, "exec", quitters[iso], "touch", "/go")
				pids[iso] = d.Inspect(t, counters[iso]).Status.HostPID
			}
			must(t, c.end(d))
			for _, iso := range isolations {
				if err := syscall.Kill(pids[iso], 0); err != nil || pids[iso] == 0 {
					t.Errorf("the counter in a %s is gone with its daemon: process %d: %v", iso, pids[iso], err)
				}
			}
			// Long enough that the quitters quit, and that the counters write what nobody reads.
			<-time.After(2500 * time.Millisecond)
			d.MustStart(t)
			for _, iso := range isolations {
				if s := d.Inspect(t, counters[iso]).Status; s.State != "WORKLOAD_STATE_RUNNING" || s.HostPID != pids[iso] {
					t.Errorf("the counter in a %s: %+v, want it running as process %d", iso, s, pids[iso])
				}
				d.Call(t, "wait", quitters[iso]).WantOut(t, "6\n")
				d.Call(t, "logs", quitters[iso]).WantOut(t, "here\ngone\n")
				d.Call(t, "exec", sleepers[iso], "echo", "back").WantOut(t, "back\n")
				d.Command("attach", sleepers[iso]).WithStdin(strings.NewReader("after\n")).Run().Want(t, 8)
				d.Call(t, "logs", sleepers[iso]).WantOut(t, "got after\n")
			}
			for _, iso := range isolations {
				d.Call(t, "exec", counters[iso], "touch", "/stop")
				d.Call(t, "wait", counters[iso]).WantOut(t, "9\n")
				wantCounted(t, d.Call(t, "logs", counters[iso]).Stdout)
			}
			// What came back can be removed and made anew like anything else.
			for _, iso := range isolations {
				d.Call(t, "rm", counters[iso])
				d.Wall(iso).Run(busybox, "echo", "new").Run().WantOut(t, "new\n")
			}
		})
	}
}

// Killed again and again while workloads come and go: nothing stays that nobody knows of.
func TestKilledWhileBusy(t *testing.T) {
	d := ownDaemon(t)
	d.Watch(t)
	for _, iso := range isolations {
		for _, after := range []time.Duration{30 * time.Millisecond, 150 * time.Millisecond, 600 * time.Millisecond, 1500 * time.Millisecond} {
			done := make(chan result, 1)
			call := d.Wall(iso).Run(busybox, "sh", "-c", "echo started; sleep 0.2")
			go func() { done <- call.Run() }()
			<-time.After(after)
			must(t, d.Kill())
			<-done
			d.MustStart(t)
			for _, id := range strings.Fields(d.Call(t, "ps", "-a", "-q").Stdout) {
				d.Call(t, "rm", "-f", id)
			}
		}
	}
}

// A daemon that is killed while it writes what it keeps (kernels, templates, images) leaves halves of them, which the next
// one removes before anything else.
func TestHalfWrittenFilesGo(t *testing.T) {
	d := ownDaemon(t)
	must(t, d.Kill())
	halves := []string{
		"microvm/.new-1", "microvm/kernel/0123/.new-2", "microvm/initramfs/.new-3", "disk-templates/tmp-4/raw", "images/tmp/erofs-5",
	}
	for _, half := range halves {
		path := filepath.Join(d.StateDir, half)
		must(t, os.MkdirAll(filepath.Dir(path), 0o700))
		must(t, os.WriteFile(path, []byte("half"), 0o600))
	}
	d.MustStart(t)
	for _, half := range halves {
		if _, err := os.Lstat(filepath.Join(d.StateDir, half)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", half, err)
		}
	}
}
