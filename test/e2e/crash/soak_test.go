package crash

import (
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

var (
	soak   = flag.Duration("soak", 0, "how long many callers are disturbed; one disturbance at least")
	seed   = flag.Uint64("seed", 1, "of the soak; 0 for one of its own, which it prints")
	cycles = flag.Int("cycles", 150, "how many workloads come and go")
)

const (
	// callers at once; every third has a virtual machine.
	callers = 6
	// disturbWithin is how long after the callers began a disturbance comes at the latest.
	disturbWithin = 2500 * time.Millisecond
	// disturbFor is how long one lasts that is not a death.
	disturbFor = 700 * time.Millisecond
	// spareDescriptors are what a daemon that runs out of them still gets.
	spareDescriptors = 3
	// diskSize holds the image, what a VM is made of, and what every caller writes.
	diskSize = 2 << 30
)

// disturbances happen to a daemon, or to the sandbox of one of its callers, while it serves all of them. Each is undone by what it
// answers with.
var disturbances = []struct {
	name string
	// Whether it is one caller's sandbox that dies.
	murders bool
	do      func(d *harness.Daemon, victim *scene) (undo func() error, err error)
}{
	{"the daemon is killed", false, func(d *harness.Daemon, _ *scene) (func() error, error) { return nil, d.Kill() }},
	{"the daemon ends in order", false, func(d *harness.Daemon, _ *scene) (func() error, error) { return nil, d.Terminate() }},
	{"a sandbox is killed", true, func(_ *harness.Daemon, victim *scene) (func() error, error) {
		if victim == nil {
			return nil, nil // its caller has not said anything yet
		}
		w, err := victim.get()
		if pid := int(w.GetStatus().GetHostPid()); err == nil && pid > 0 {
			err = killAndWait(pid)
		}
		if errors.Is(err, unix.ESRCH) || notFound(err) {
			err = nil // it was quicker
		}
		return nil, err
	}},
	{"no more descriptors", false, func(d *harness.Daemon, _ *scene) (func() error, error) {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.Cmd.Process.Pid))
		if err != nil {
			return nil, err
		}
		return limit(d, unix.RLIMIT_NOFILE, uint64(len(entries)+spareDescriptors))
	}},
	{"a full disk", false, func(d *harness.Daemon, _ *scene) (func() error, error) { return fill(d) }},
	{"no more memory", false, func(d *harness.Daemon, _ *scene) (func() error, error) {
		undo, err := limit(d, unix.RLIMIT_DATA, 1<<20)
		// Go gives up when it gets none, perhaps only by and by: a daemon that lacked it is replaced.
		return func() error { return errors.Join(undo(), d.Kill()) }, err
	}},
}

// limit has the daemon have no more of something from now on.
func limit(d *harness.Daemon, what int, most uint64) (undo func() error, err error) {
	pid := d.Cmd.Process.Pid
	var was unix.Rlimit
	if err := unix.Prlimit(pid, what, nil, &was); err != nil {
		return nil, err
	}
	err = unix.Prlimit(pid, what, &unix.Rlimit{Cur: most, Max: was.Max}, nil)
	return func() error {
		if err := unix.Prlimit(pid, what, &was, nil); err != nil && !errors.Is(err, unix.ESRCH) { // it may have died of it
			return err
		}
		return nil
	}, err
}

// smallDisk is a file system of its own, which can be filled.
func smallDisk(t *testing.T) (dir string) {
	t.Helper()
	dir, err := os.MkdirTemp(harness.Cache, "soak-")
	harness.Must(t, err)
	t.Cleanup(func() { harness.Must(t, os.RemoveAll(dir)) })
	file, dir := filepath.Join(dir, "file"), filepath.Join(dir, "disk")
	harness.Must(t, os.WriteFile(file, nil, 0o600))
	harness.Must(t, os.Truncate(file, diskSize))
	harness.Must(t, os.Mkdir(dir, 0o700))
	for _, command := range [][]string{{"mkfs.ext4", "-q", file}, {"mount", "-o", "loop", file, dir}} {
		if out, err := harness.Output(exec.Command(command[0], command[1:]...)); err != nil {
			t.Fatalf("%s: %v: %s", command[0], err, out)
		}
	}
	t.Cleanup(func() { harness.Must(t, unix.Unmount(dir, 0)) })
	return dir
}

// fill leaves no room on the disk that the daemon's state is on.
func fill(d *harness.Daemon) (undo func() error, err error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(d.StateDir, &fs); err != nil {
		return nil, err
	}
	f, err := os.Create(filepath.Join(filepath.Dir(d.StateDir), "filler"))
	if err != nil {
		return nil, err
	}
	defer f.Close() //nolint:errcheck // it is removed
	undo = func() error { return os.Remove(f.Name()) }
	// Root's own reserve included, piece by piece: the last ones may not be had in one go.
	for size, piece := int64(0), int64(fs.Bfree)*fs.Bsize; piece >= fs.Bsize; piece /= 2 {
		for unix.Fallocate(int(f.Fd()), 0, size, piece) == nil {
			size += piece
		}
	}
	return undo, nil
}

// soakStories are the stories that a caller can tell beside others: those that end the daemon themselves are left out.
func soakStories() (found []int) {
	for i, s := range stories {
		if !strings.HasPrefix(s.name, "a daemon") && s.name != "the first virtual machine" {
			found = append(found, i)
		}
	}
	return found
}

// Many callers at once, and things that happen to the daemon meanwhile: what they were told holds, and nothing is left.
func TestSoak(t *testing.T) {
	disk := smallDisk(t)
	d := harness.MakeNetworkedDaemon(t)
	harness.Must(t, os.Remove(d.StateDir)) // empty
	d.StateDir = filepath.Join(disk, "state")
	harness.Must(t, os.Mkdir(d.StateDir, 0o700))
	u := newSuiteWith(t, d, both)
	d.Env = nil // no points: one that cannot ask, for lack of descriptors, ends the daemon
	harness.Must(t, errors.Join(d.Kill(), d.Start()))
	n := *seed
	if n == 0 {
		n = rand.Uint64()
	}
	t.Logf("-seed %d", n)
	r := rand.New(rand.NewPCG(n, n))
	for began := time.Now(); time.Since(began) < *soak || u.tally.points == 0; {
		u.round(r)
	}
	u.farewell()
}

// caller tells one story after another until the disturbance is over, or it is told an error.
type caller struct {
	wall    string
	murder  bool
	choice  *rand.Rand
	current atomic.Pointer[scene]
	scenes  []*scene
	told    []string
	err     error
}

func (c *caller) talk(scene func(wall string) *scene, over *atomic.Bool) {
	tellable := soakStories()
	for c.err == nil && !over.Load() {
		story := stories[tellable[c.choice.IntN(len(tellable))]]
		wall := c.wall
		if len(story.walls) == 1 {
			wall = story.walls[0]
		}
		s := scene(wall)
		s.disk = diskBase
		s.asked[murder] = c.murder
		c.scenes, c.told = append(c.scenes, s), append(c.told, story.name)
		c.current.Store(s)
		c.err = story.tell(s)
	}
}

func (u *suite) round(r *rand.Rand) {
	disturbance := disturbances[r.IntN(len(disturbances))]
	var mu sync.Mutex
	scene := func(wall string) *scene {
		mu.Lock()
		defer mu.Unlock()
		return u.scene(wall)
	}
	all := make([]*caller, callers)
	for i := range all {
		all[i] = &caller{wall: both[0], choice: rand.New(rand.NewPCG(r.Uint64(), r.Uint64()))}
		if i%3 == 2 {
			all[i].wall = both[1]
		}
	}
	victim := all[r.IntN(callers)]
	victim.murder = disturbance.murders
	delay := time.Duration(r.Int64N(int64(disturbWithin)))
	pid := u.d.Cmd.Process.Pid
	var over atomic.Bool
	var g sync.WaitGroup
	for _, c := range all {
		g.Go(func() { c.talk(scene, &over) })
	}
	time.Sleep(delay)
	undo, err := disturbance.do(u.d, victim.current.Load())
	if err != nil {
		u.t.Errorf("%s: %v", disturbance.name, err)
	}
	if undo != nil {
		time.Sleep(disturbFor)
		harness.Must(u.t, undo())
	}
	over.Store(true)
	g.Wait()
	var lost []string
	lives, cut := 0, 0
	for _, c := range all {
		if c.err != nil {
			cut++
		}
		for i, s := range c.scenes {
			lives++
			if err := s.restartIfDead(); err != nil {
				u.t.Fatalf("%s: the daemon does not come back: %v\n%s", disturbance.name, err, u.d.LogTail())
			}
			for _, l := range s.truth() {
				lost = append(lost, fmt.Sprintf("%s (%s, %q, %v): %s", s.name, s.wall, c.told[i], c.err, l))
			}
			_ = s.c.Close() // nothing is under way
		}
	}
	lost = append(lost, u.visit()...)
	leaked, err := u.clean.Leaks(u.d, harness.SettleTimeout)
	harness.Must(u.t, err)
	u.tally.points++
	u.tally.lost += len(lost)
	u.tally.leaked += len(leaked)
	if len(lost)+len(leaked) > 0 {
		u.t.Errorf("%s after %s: lost:\n\t%s\nleft:\n\t%s\n%s", disturbance.name, delay, strings.Join(lost, "\n\t"), strings.Join(leaked, "\n\t"), u.d.LogTail())
	}
	died := ""
	if u.d.Cmd.Process.Pid != pid {
		died = "; the daemon was started again"
	}
	u.t.Logf("%s after %s, during %d lives: %d of %d callers got an error%s", disturbance.name, delay.Round(time.Millisecond), lives, cut, callers, died)
}
