package crash

import (
	"cmp"
	"fmt"
	"slices"
	"testing"
	"time"
)

const (
	// poolPlace has the points that only a daemon with a pool of agents comes to.
	poolPlace = "container from the pool"
	poolFlag  = "--agent-pool=1"
	// begun is when a start has taken what waited: the pool is filled again after it.
	begun = "start: process started"
)

// filled are the places that making a sandbox ahead of time comes to.
var filled = []string{"container start", poolPlace, "cgroup", "layer"}

// sees waits until a point was come to.
func (g *gate) sees(at string) error {
	for deadline := time.Now().Add(trapLimit); time.Now().Before(deadline); time.Sleep(pollPause) {
		if _, ok := g.wasSeen()[at]; ok {
			return nil
		}
	}
	return fmt.Errorf("nothing came to %q", at)
}

// withPool has the daemon come back with a pool, and tells of a start from it.
func (u *suite) withPool(s *scene) error {
	u.d.Args = append(u.d.Args, poolFlag)
	s.disk = 0 // the default, which the pool has
	return inOrder(s.restart,
		func() error { return u.gate.sees(poolPlace + ": made") },
		func() error { return s.create(nil) }, s.start)
}

// withoutPool is for the daemon after it: what waits for use would be taken for left over.
func (u *suite) withoutPool() {
	u.d.Args = slices.DeleteFunc(u.d.Args, func(a string) bool { return a == poolFlag })
}

// A daemon with a pool is killed at each point of handing out what waits, and of making the next.
func TestDaemonWithPoolDies(t *testing.T) {
	u := newSuite(t, both[:1])
	s := u.scene("container")
	u.gate.set("", nil)
	if err := u.withPool(s); err != nil {
		t.Fatal(err)
	}
	handedOut := u.gate.wasSeen()
	u.gate.set("", nil)
	if err := u.gate.sees(poolPlace + ": prepared"); err != nil {
		t.Fatal(err)
	}
	ahead := u.gate.wasSeen()
	u.withoutPool()
	if err := s.restart(); err != nil {
		t.Fatal(err)
	}
	if err := s.delete(true); err != nil {
		t.Fatal(err)
	}
	_ = s.c.Close() // nothing is under way
	for _, p := range points(t) {
		if !slices.Contains(filled, p.place) {
			continue
		}
		after := ""
		_, isAhead := ahead[p.String()]
		_, isHandedOut := handedOut[p.String()]
		switch {
		case isAhead:
			if !*whole && p.place != poolPlace {
				continue // tried without a pool
			}
			after = begun
		case p.place == poolPlace && isHandedOut:
		case p.place == poolPlace:
			t.Errorf("%s: no start with a pool comes there", p)
			continue
		default:
			continue // not in a pool's work
		}
		u.try(deed{
			point: p, after: after, wall: "container", name: "a start from the pool", tell: u.withPool, do: kill, change: u.withoutPool,
		})
	}
	u.farewell()
}

// What the suite is for it finds: one daemon acts before it records, another does not undo. Each is tried at a point where
// that is harmless for a whole one.
func TestNegativeControls(t *testing.T) {
	u := newSuite(t, both[:1])
	whole := u.d.Env
	weak := func(without string) { u.d.Env = append(slices.Clone(whole), "SANDBOXD_WEAKEN="+without) }
	for _, c := range []struct {
		without string
		deed    deed
		found   func(outcome) []string
	}{
		{
			"record of an exit before its sandbox goes",
			deed{point: point{place: "end", step: "shut down"}, name: stories[0].name, tell: func(s *scene) error {
				if err := s.restart(); err != nil {
					return err
				}
				return stories[0].tell(s)
			}},
			func(o outcome) []string { return o.lost },
		},
		{
			"removal of strays",
			deed{point: point{place: poolPlace, step: "made"}, after: begun, name: "a start from the pool", tell: u.withPool, change: u.withoutPool},
			func(o outcome) []string { return o.leaked },
		},
	} {
		for _, without := range []string{"", c.without} {
			t.Run("without "+cmp.Or(without, "nothing"), func(t *testing.T) {
				weak(without)
				d := c.deed
				if without != "" {
					d.settle = 2 * time.Second // it does not go at all
				}
				d.wall, d.do = "container", kill
				d.revert = func() { u.d.Env = whole }
				o, err := u.die(d)
				if err != nil {
					t.Fatalf("%v\n%s", err, u.d.LogTail())
				}
				switch n := len(o.lost) + len(o.leaked); {
				case without == "" && n > 0:
					t.Errorf("whole, but: lost %q, left %q", o.lost, o.leaked)
				case without != "" && len(c.found(o)) == 0:
					t.Errorf("the suite does not notice: lost %q, left %q", o.lost, o.leaked)
				default:
					t.Logf("lost %q, left %q", o.lost, o.leaked)
				}
			})
		}
	}
}
