package harness

import (
	"fmt"
	"os"
	"os/signal"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// adoptOrphans makes this process the parent of whatever loses its own below it. So every process that any daemon of ours
// ever made is a descendant of this one, and none of anybody else's is: the exact answer to "what is left?". A real init
// would reap what it adopts at once, so we do.
func adoptOrphans() error {
	if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot adopt orphans: %w", err)
	}
	died := make(chan os.Signal, 1)
	signal.Notify(died, unix.SIGCHLD)
	// Lives as long as the process does.
	go func() {
		for range died {
			reapOrphans()
		}
	}()
	return nil
}

func reapOrphans() {
	children.Lock()
	defer children.Unlock()
	for _, p := range processes() {
		if p.parent == os.Getpid() && p.state == 'Z' && !children.pids[p.pid] {
			// It is ours and dead, so this returns at once.
			_, _ = unix.Wait4(p.pid, nil, unix.WNOHANG, nil)
		}
	}
}

// process is a line of ps.
type process struct {
	pid, parent int
	state       byte
	name        string
}

// processes lists all that can be read; what ends meanwhile is left out.
func processes() []process {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var all []process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		stat, err := os.ReadFile("/proc/" + e.Name() + "/stat")
		if err != nil {
			continue
		}
		// pid (name) state parent …; the name may hold anything, parentheses too.
		open, end := strings.IndexByte(string(stat), '('), strings.LastIndexByte(string(stat), ')')
		fields := strings.Fields(string(stat[end+1:]))
		if open < 0 || end < open || len(fields) < 2 {
			continue
		}
		parent, err := strconv.Atoi(fields[1])
		if err != nil {
			continue
		}
		all = append(all, process{pid, parent, fields[0][0], string(stat[open+1 : end])})
	}
	return all
}

// descendants are the processes below this one that the test did not start itself, the dead left out.
func descendants() []process {
	below := map[int]bool{os.Getpid(): true}
	all := processes()
	// A child may be listed before its parent: go round until nothing is added.
	for grew := true; grew; {
		grew = false
		for _, p := range all {
			if below[p.parent] && !below[p.pid] {
				below[p.pid], grew = true, true
			}
		}
	}
	children.Lock()
	defer children.Unlock()
	var found []process
	for _, p := range all {
		if below[p.pid] && p.pid != os.Getpid() && p.state != 'Z' && !children.pids[p.pid] {
			found = append(found, p)
		}
	}
	return found
}
