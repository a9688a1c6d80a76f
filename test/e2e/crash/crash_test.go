package crash

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sandboxd/sandboxd/test/e2e/harness"
)

const (
	// sceneLimit bounds one scene, its daemon's restart included; a VM that software emulates on a busy machine takes longest.
	sceneLimit = 3 * time.Minute
	// trapLimit bounds the wait for a point that is come to after the last answer.
	trapLimit = 20 * time.Second
	// A file system of a size that no earlier scene had has its own template.
	diskBase, diskStep = 64 << 20, 1 << 20
)

// counter is what a neighbour does the whole time: every number must be in its log, once, in order.
//
// It starts no process while it counts: one that comes and goes would be taken for left over.
const counter = `mkfifo /pause; exec 3<>/pause; i=0; while [ ! -e /stop ]; do echo $i; i=$((i+1)); read -t 0.05 x <&3; done; echo end $i; exit 9`

// whole is for `make crash`. Without it a point that both walls have in common is tried behind one only: its code is the same,
// and a container starts in a tenth of a virtual machine's time.
var whole = flag.Bool("whole", false, "try each point behind every wall that comes there")

// suite is a daemon that dies again and again beside neighbours that do not.
type suite struct {
	t    *testing.T
	d    *harness.Daemon
	gate *gate

	scenes     int
	neighbours []*neighbour
	clean      harness.Snapshot
	tally      tally
}

// tally is what was tried, and what came of it.
type tally struct{ points, lost, leaked int }

// all of this run's suites, for the last line.
var all tally

func (c tally) String() string {
	return fmt.Sprintf("%d points, lost %d, leaked %d", c.points, c.lost, c.leaked)
}

type neighbour struct {
	wall, id string
	pid      int
}

// newSuite starts a daemon with points, and a neighbour behind each of the walls.
func newSuite(t *testing.T, walls []string, args ...string) *suite {
	t.Helper()
	return newSuiteWith(t, harness.MakeNetworkedDaemon(t, args...), walls)
}

// newSuiteWith is newSuite with a daemon that does not run yet.
func newSuiteWith(t *testing.T, d *harness.Daemon, walls []string) *suite {
	t.Helper()
	u := &suite{t: t, gate: openGate(t), d: d}
	u.d.Program = filepath.Join(testBuild(t), "sandboxd")
	u.d.Env = []string{faultVariable + "=" + u.gate.path}
	u.d.MustStart(t)
	harness.Must(t, u.d.Import(harness.Busybox))
	for _, wall := range walls {
		id := u.d.Wall(wall).Start(t, harness.Busybox, "sh", "-c", counter)
		u.neighbours = append(u.neighbours, &neighbour{wall, id, u.d.Inspect(t, id).Status.HostPID})
	}
	// Everything that is made once and kept has been made after this.
	for _, wall := range walls {
		s := u.scene(wall)
		harness.Must(t, stories[0].tell(s))
		harness.Must(t, s.restart())
		_ = s.c.Close() // nothing is under way
	}
	u.clean = harness.TakeSnapshot(t, u.d)
	return u
}

func (u *suite) scene(wall string) *scene {
	u.t.Helper()
	u.scenes++
	if wall == "neither" {
		wall = "container"
	}
	ctx, cancel := context.WithTimeout(u.t.Context(), sceneLimit)
	u.t.Cleanup(cancel)
	s := &scene{
		ctx: ctx, d: u.d, wall: wall, name: fmt.Sprintf("scene-%d", u.scenes), disk: diskBase + uint64(u.scenes)*diskStep,
		asked: map[string]bool{}, told: map[string]bool{}, files: map[string]string{},
	}
	harness.Must(u.t, s.dial())
	return s
}

// where says in which story each point is come to soonest, by telling every story once without any harm.
func (u *suite) where() map[string]int {
	type visit struct {
		story int
		after time.Duration
	}
	first := map[string]visit{}
	for i, story := range stories {
		for _, wall := range story.walls {
			if wall == "vm" && !*whole && !story.vm {
				continue
			}
			s := u.scene(wall)
			u.gate.set("", nil)
			if err := story.tell(s); err != nil {
				u.t.Fatalf("%s behind %s, with nobody's death: %v\n%s", story.name, wall, err, u.d.LogTail())
			}
			for at, after := range u.gate.wasSeen() {
				key := wall + ": " + at
				if v, ok := first[key]; !ok || after < v.after {
					first[key] = visit{i, after}
				}
			}
			_ = s.c.Close() // nothing is under way
		}
	}
	found := map[string]int{}
	for key, v := range first {
		found[key] = v.story
	}
	return found
}

// wallsOf are those behind which a point must be tried.
func wallsOf(p point) []string {
	if p.wall == "both" {
		return both
	}
	return []string{p.wall}
}

// deed is a story in which something happens at a point.
type deed struct {
	point point
	// The point that something must have come to before.
	after string
	wall  string
	name  string
	tell  func(*scene) error
	do    func(*scene)
	// What is to be different for the daemon that comes back, and set right again after the look; nil if nothing is.
	change, revert func()
	// How long what is left may take to go; 0 for harness.SettleTimeout.
	settle time.Duration
}

// outcome is what did not hold after a deed.
type outcome struct{ lost, leaked []string }

// die does the deed, then looks at the truth.
func (u *suite) die(c deed) (o outcome, err error) {
	s := u.scene(c.wall)
	began := time.Now()
	trap := u.gate.setAfter(c.after, c.point.String(), func() { c.do(s) })
	err = c.tell(s)
	for deadline := time.Now().Add(trapLimit); !trap.await(u.gate); time.Sleep(pollPause) {
		if err != nil || time.Now().After(deadline) {
			return o, fmt.Errorf("%q did not come there: %w", c.name, err)
		}
	}
	u.gate.clear()
	if c.change != nil {
		c.change()
	}
	if err := s.restartIfDead(); err != nil {
		return o, fmt.Errorf("the daemon does not come back: %w", err)
	}
	o.lost = append(s.truth(), u.visit()...)
	_ = s.c.Close() // nothing is under way
	if o.leaked, err = u.clean.Leaks(u.d, cmp.Or(c.settle, harness.SettleTimeout)); err != nil {
		return o, err
	}
	if c.revert != nil {
		c.revert()
		if err := errors.Join(u.d.Kill(), u.d.Start()); err != nil {
			return o, err
		}
	}
	u.t.Logf("%-50s %-10s %5.2f s", c.point, c.wall, time.Since(began).Seconds())
	return o, nil
}

// try is die, and counts.
func (u *suite) try(c deed) {
	o, err := u.die(c)
	if err != nil {
		u.t.Errorf("%s behind %s: %v\n%s", c.point, c.wall, err, u.d.LogTail())
		harness.Must(u.t, errors.Join(u.d.Kill(), u.d.Start()))
		return
	}
	u.tally.points++
	u.tally.lost += len(o.lost)
	u.tally.leaked += len(o.leaked)
	for what, found := range map[string][]string{"lost": o.lost, "left": o.leaked} {
		if len(found) > 0 {
			u.t.Errorf("%s behind %s in %q: %s:\n\t%s\n%s", c.point, c.wall, c.name, what, strings.Join(found, "\n\t"), u.d.LogTail())
		}
	}
}

func kill(s *scene) { _ = s.d.Kill() }

// restartIfDead starts the daemon anew if it has died.
func (s *scene) restartIfDead() error {
	if s.d.Running() {
		return s.dial()
	}
	return s.restart()
}

// visit looks at the neighbours.
func (u *suite) visit() (lost []string) {
	for _, n := range u.neighbours {
		if s := u.d.Inspect(u.t, n.id).Status; s.State != "WORKLOAD_STATE_RUNNING" || s.HostPID != n.pid {
			lost = append(lost, fmt.Sprintf("the neighbour in a %s is %s as process %d, not %d: %s", n.wall, s.State, s.HostPID, n.pid, s.Message))
		}
	}
	return lost
}

// farewell ends the neighbours and looks at all they wrote.
func (u *suite) farewell() {
	for _, n := range u.neighbours {
		u.d.Command("exec", n.id, "touch", "/stop").Run() // it may be killed at once with the rest: its end shows
		u.d.Call(u.t, "wait", n.id).WantOut(u.t, "9\n")
		lines := strings.Split(strings.TrimSuffix(u.d.Call(u.t, "logs", n.id).Stdout, "\n"), "\n")
		for i, l := range lines {
			want := fmt.Sprint(i)
			if i == len(lines)-1 {
				want = fmt.Sprint("end ", i)
			}
			if l != want {
				u.tally.lost++
				u.t.Errorf("line %d of %d of the neighbour in a %s is %q, not %q", i, len(lines), n.wall, l, want)
				break
			}
		}
	}
	u.t.Log(u.tally)
	all.points += u.tally.points
	all.lost += u.tally.lost
	all.leaked += u.tally.leaked
}

// The daemon is killed at every point there is, behind each wall that comes there.
func TestDaemonDiesAtEveryPoint(t *testing.T) {
	u := newSuite(t, both)
	where := u.where()
	for _, p := range points(t) {
		if p.place == poolPlace {
			continue // TestDaemonWithPoolDies
		}
		if p.place == templatePlace || p.place == vmPoolPlace {
			continue // TestDaemonWithVMPoolDies
		}
		walls := wallsOf(p)
		if !*whole {
			walls = walls[:1]
		}
		reached := false
		for _, wall := range walls {
			if story, ok := where[wall+": "+p.String()]; ok {
				u.try(deed{point: p, wall: wall, name: stories[story].name, tell: stories[story].tell, do: kill})
				reached = true
			}
		}
		if !reached {
			t.Errorf("%s behind %s: no story comes there", p, walls)
		}
	}
	u.farewell()
}
