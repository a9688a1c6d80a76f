package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

const (
	// ioSize is read or written in one go, ioRate is how much may be a second.
	ioSize = 6 << 20
	ioRate = 2 << 20
)

// A workload's reads are held to its limit, which an update lifts; writes, too, where the host can tell whose they are. A
// rate over the whole time, so that a busy machine can make it lower only.
func TestIOLimit(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		id := w.Start(t, "--disk", "64m", "--memory", "128m", "--io-read-bps", fmt.Sprint(ioRate), busybox, "sh", "-c",
			fmt.Sprintf("dd if=/dev/urandom of=/data bs=1M count=%d conv=fsync 2>/dev/null; sync; echo ready; exec sleep 600", ioSize>>20))
		w.WaitForLog(t, id, "ready\n")
		read := func() (took, waited time.Duration, bytes int64) {
			t.Helper()
			forget(t, w.Daemon, id)
			before, began := w.Usage(t, id), time.Now()
			w.Exec(id, "dd", "if=/data", "of=/dev/null", "bs=1M", "iflag=direct").Run().Want(t, 0)
			took = time.Since(began)
			after := w.Usage(t, id)
			was, _ := before.IOPressure.Some(t)
			is, _ := after.IOPressure.Some(t)
			t.Logf("read %d bytes in %v, of which it waited %v", number(t, after.IOReadBytes)-number(t, before.IOReadBytes), took, is-was)
			return took, is - was, number(t, after.IOReadBytes) - number(t, before.IOReadBytes)
		}
		held, waited, bytes := read()
		if bytes < ioSize || bytes > 2*ioSize {
			t.Errorf("the cgroup counts %d bytes read of %d", bytes, ioSize)
		}
		// The kernel lets the first slice of a second's worth through.
		if rate := float64(bytes) / held.Seconds(); rate > 1.5*ioRate {
			t.Errorf("read %d bytes in %v: %.0f a second, limited to %d", bytes, held, rate, ioRate)
		}
		w.Call(t, "update", "--io-read-bps", "0", id)
		if harness.HasPSI() && (waited < held/4 || waited > held) {
			t.Errorf("it waited %v for the disk of %v that it was held back", waited, held)
		}
		eventually(t, time.Minute, "without the limit it reads faster than that", func() (bool, string) {
			free, _, bytes := read()
			return bytes >= ioSize && free < held*2/3, fmt.Sprintf("%d bytes took %v, with it %v", bytes, free, held)
		})

		write := w.Command("update", "--io-write-bps", fmt.Sprint(ioRate), id).Run()
		if w.Isolation == "container" && !hasV2() {
			write.WantError(t, 125, "cgroup v1", "io_write", "vm isolation")
			return
		}
		write.Want(t, 0)
		wrote := func() (took time.Duration, bytes int64) {
			t.Helper()
			before, began := number(t, w.Usage(t, id).IOWriteBytes), time.Now()
			// Put off by whoever is inside, over what is there and as a new file: the limit holds for both.
			w.Exec(id, "sh", "-c", fmt.Sprintf("for f in data new; do dd if=/dev/zero of=/$f bs=1M count=%d conv=fsync,notrunc 2>/dev/null || exit; done", ioSize>>21)).Run().Want(t, 0)
			took, bytes = time.Since(began), number(t, w.Usage(t, id).IOWriteBytes)-before
			t.Logf("wrote %d bytes in %v", bytes, took)
			return took, bytes
		}
		held, bytes = wrote()
		if rate := float64(bytes) / held.Seconds(); bytes < ioSize || rate > 1.5*ioRate {
			t.Errorf("wrote %d bytes in %v: %.0f a second, limited to %d", bytes, held, rate, ioRate)
		}
		w.Call(t, "update", "--io-write-bps", "0", id)
		eventually(t, time.Minute, "without the limit it writes faster than that", func() (bool, string) {
			free, bytes := wrote()
			return free < held*2/3, fmt.Sprintf("%d bytes took %v, with it %v", bytes, free, held)
		})
	})
}

// forget has the host's kernel forget what it keeps in memory of a workload's layer: what is there is read from no disk.
func forget(t *testing.T, d *daemon, id string) {
	t.Helper()
	layers, err := filepath.Glob(filepath.Join(d.StateDir, "*", id, "*"))
	must(t, err)
	found := false
	for _, layer := range layers {
		f, err := os.Open(layer)
		must(t, err)
		if info, err := f.Stat(); err == nil && info.Mode().IsRegular() {
			found = true
			must(t, f.Sync())
			must(t, unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED))
		}
		must(t, f.Close())
	}
	if !found {
		t.Fatalf("no layer of %s in %s", id, d.StateDir)
	}
}
