package e2e

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

const (
	// latencySamples are taken of a neighbour in each situation.
	latencySamples = 10
	// manyFiles go into one directory.
	manyFiles = 100_000
	// fewInodes is what the host's own file system may lose while they are made: of logs and records.
	fewInodes = 5000
	logSize   = 1 << 20
)

// A hostile workload, and one that has no limits where the first has: what is checked of the first must not hold for the second.
var (
	limited   = []string{"--ulimit", "nofile=256:256", "--pids", "128", "--log-size", fmt.Sprint(logSize)}
	unlimited = []string{"--pids", "1024", "--log-size", "64m", "-e", "MOST=160"}
)

// disturbances are what it does to its neighbours, in this order. bounded says whether that had an end.
var disturbances = []struct {
	name    string
	bounded func(t *testing.T, w wall, id string) (bool, string)
}{
	{"descriptors without end", func(t *testing.T, w wall, id string) (bool, string) {
		r := w.Exec(id, "python3", "-c", "import os\nn = 0\ntry:\n  while n < 1000: n = os.open('/dev/null', 0)\nexcept OSError as e: print(e.strerror)\nprint(n)").Run()
		r.Want(t, 0)
		return strings.HasPrefix(r.Stdout, "Too many open files\n") && strings.HasSuffix(r.Stdout, "\n255\n"), r.Stdout
	}},
	{"a flood of output", func(t *testing.T, w wall, id string) (bool, string) {
		w.Exec(id, "touch", "/flood").Run().Want(t, 0)
		kept := int64(0)
		eventually(t, time.Minute, "twice as much is written as may be kept", func() (bool, string) {
			kept = diskUsage(t, w.Daemon, id)
			var dropped int64
			if r := w.Call(t, "logs", id); r.Stderr != "" {
				if _, err := fmt.Sscanf(r.Stderr, "sandboxctl: %d bytes of output are gone", &dropped); err != nil {
					t.Fatalf("logs says %q", r.Stderr)
				}
			}
			return kept+dropped > 2*logSize+logSize/2, fmt.Sprintf("%d kept, %d dropped", kept, dropped)
		})
		return kept <= logSize+logSize/4, fmt.Sprintf("%d bytes are kept of its output", kept)
	}},
	{"a fork bomb", func(t *testing.T, w wall, id string) (bool, string) {
		w.Exec(id, "touch", "/bomb").Run().Want(t, 0)
		said := ""
		eventually(t, time.Minute, "the bomb has gone off", func() (bool, string) {
			said = w.Call(t, "logs", "--tail", "1", id).Stdout
			return said == "full\n" || said == "all\n", said
		})
		return said == "full\n", said
	}},
}

// One sandbox does its worst; its neighbour, a container, and the daemon answer all the while, and it can be removed. How fast
// they answer is said and not judged: the machine may be busy with others.
func TestHostileNeighbour(t *testing.T) {
	both(t, func(t *testing.T, w wall) {
		neighbour := w.Daemon.Wall("container").Start(t, busybox, "sleep", "600")
		start := func(flags []string) string {
			t.Helper()
			flags = append(slices.Clone(flags), "--cpus", "1", "--memory", "512m", "--disk", "2g", debian, "python3", "-c", harness.Bomb)
			id := w.Start(t, flags...)
			w.WaitForLog(t, id, "ready\n")
			return id
		}
		id := start(limited)
		unharmed(t, w, "nothing", neighbour)

		many := "mkdir /many && cd /many && seq " + fmt.Sprint(manyFiles) + " | xargs -n 5000 touch && ls | wc -l"
		if n := inodesLost(t, w.Daemon, func() { w.Exec(id, "sh", "-c", many).Run().WantOut(t, fmt.Sprintln(manyFiles)) }); n > fewInodes {
			t.Errorf("%d files in a directory took %d inodes of the host's", manyFiles, n)
		}
		unharmed(t, w, "a directory of 100,000 files", neighbour)
		for _, d := range disturbances {
			if ok, said := d.bounded(t, w, id); !ok {
				t.Errorf("%s: %s", d.name, abridged(said))
			}
			unharmed(t, w, d.name, neighbour)
		}
		w.Call(t, "rm", "-f", id)
		unharmed(t, w, "its removal", neighbour)

		// The same where each of them may: what is looked at above would be seen.
		id = start(unlimited)
		for _, d := range disturbances {
			if ok, said := d.bounded(t, w, id); ok {
				t.Errorf("%s, without its limit: %s", d.name, abridged(said))
			}
		}
	})
}

// The count of inodes sees files of the host's own.
func TestInodesLostFindsFiles(t *testing.T) {
	dir, err := os.MkdirTemp(shared.StateDir, "files-")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	n := inodesLost(t, shared, func() {
		for i := range 2 * fewInodes {
			must(t, os.WriteFile(filepath.Join(dir, fmt.Sprint(i)), nil, 0o600))
		}
	})
	if n <= fewInodes {
		t.Errorf("%d files took %d inodes", 2*fewInodes, n)
	}
}

// unharmed: the neighbour and the daemon do what they are asked.
func unharmed(t *testing.T, w wall, during, neighbour string) {
	t.Helper()
	var took []time.Duration
	for i := range latencySamples {
		r := w.Call(t, "exec", neighbour, "echo", fmt.Sprint("unharmed ", i))
		r.WantOut(t, fmt.Sprintf("unharmed %d\n", i))
		took = append(took, r.Took)
	}
	slices.Sort(took)
	began := time.Now()
	w.Call(t, "run", "--rm", "--isolation", "container", busybox, "echo", "started").WantOut(t, "started\n")
	t.Logf("after %s: a neighbour's exec takes %v, at worst %v; a new container %v", during, took[len(took)/2], took[len(took)-1], time.Since(began))
	if out := w.Call(t, "ps").Stdout; !strings.Contains(out, neighbour[:12]) {
		t.Errorf("after %s ps does not show the neighbour:\n%s", during, out)
	}
}

// inodesLost is how many fewer the file system of a daemon's state has after do.
func inodesLost(t *testing.T, d *daemon, do func()) int64 {
	t.Helper()
	free := func() int64 {
		var st unix.Statfs_t
		must(t, unix.Statfs(d.StateDir, &st))
		if st.Files == 0 {
			t.Fatalf("%s is on a file system that does not count inodes", d.StateDir)
		}
		return int64(st.Ffree)
	}
	before := free()
	do()
	return before - free()
}

// diskUsage is what a workload's output takes on the disk.
func diskUsage(t *testing.T, d *daemon, id string) (sum int64) {
	t.Helper()
	found := false
	must(t, filepath.WalkDir(d.StateDir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || !strings.Contains(path, id) || !strings.Contains(path, "output") {
			if os.IsNotExist(err) {
				return nil
			}
			return err
		}
		if info, err := e.Info(); err == nil { // not a segment that went just now
			found = true
			sum += info.Size()
		}
		return nil
	}))
	if !found {
		t.Fatalf("no output of %s below %s", id, d.StateDir)
	}
	return sum
}
