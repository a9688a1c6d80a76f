package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
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
		id := w.Start(t, "--disk", "64m", "--memory", "128m", "--io-read-bps", fmt.Sprint(ioRate), debian, "sh", "-c",
			fmt.Sprintf("dd if=/dev/urandom of=/data bs=1M count=%d conv=fsync 2>/dev/null; sync; echo ready; exec sleep 600", ioSize>>20))
		w.WaitForLog(t, id, "ready\n")
		read := func() (took time.Duration, bytes int64) {
			t.Helper()
			forget(t, w.Daemon, id)
			before, began := number(t, w.Usage(t, id).IOReadBytes), time.Now()
			w.Exec(id, "dd", "if=/data", "of=/dev/null", "bs=1M", "iflag=direct").Run().Want(t, 0)
			took = time.Since(began)
			return took, number(t, w.Usage(t, id).IOReadBytes) - before
		}
		held, bytes := read()
		t.Logf("read %d bytes in %v", bytes, held)
		if bytes < ioSize || bytes > 2*ioSize {
			t.Errorf("the cgroup counts %d bytes read of %d", bytes, ioSize)
		}
		// The kernel lets the first slice of a second's worth through.
		if rate := float64(bytes) / held.Seconds(); rate > 1.5*ioRate {
			t.Errorf("read %d bytes in %v: %.0f a second, limited to %d", bytes, held, rate, ioRate)
		}
		w.Call(t, "update", "--io-read-bps", "0", id)
		free, bytes := read()
		t.Logf("without a limit read %d bytes in %v", bytes, free)
		if bytes < ioSize || free > held*2/3 {
			t.Errorf("without the limit %d bytes took %v, with it %v", bytes, free, held)
		}

		write := w.Command("update", "--io-write-bps", fmt.Sprint(ioRate), id).Run()
		if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err != nil {
			write.WantError(t, 125, "cgroup v1", "io_write")
			return
		}
		write.Want(t, 0)
		before, began := number(t, w.Usage(t, id).IOWriteBytes), time.Now()
		w.Exec(id, "dd", "if=/dev/zero", "of=/data", "bs=1M", fmt.Sprintf("count=%d", ioSize>>20), "oflag=direct", "conv=fsync,notrunc").Run().Want(t, 0)
		took, written := time.Since(began), number(t, w.Usage(t, id).IOWriteBytes)-before
		if rate := float64(written) / took.Seconds(); written < ioSize || rate > 1.5*ioRate {
			t.Errorf("wrote %d bytes in %v: %.0f a second, limited to %d", written, took, rate, ioRate)
		}
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
