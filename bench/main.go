// Command bench measures sandboxd beside its peers, in one run, on one machine: every row's commands take turns, and a
// command's exit status is checked with a process that exits 7 before any of its times count. Ratios are what counts;
// the times drift with the machine.
package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

type options struct {
	// Made by run.
	runDir string

	bin, cache string
	runs       int
	vmRuns     int
	crowd      int
	asJSON     bool
	trace      bool
	pool       int
	only       string
	manyVMs    int
	templates  bool
	large      bool
}

func main() {
	var o options
	flag.StringVar(&o.bin, "bin", "bin", "directory of the built binaries")
	flag.StringVar(&o.cache, "cache", ".cache", "directory of the test assets")
	flag.IntVar(&o.runs, "runs", 40, "measured runs of each container command")
	flag.IntVar(&o.vmRuns, "vm-runs", 10, "measured runs of each VM command")
	flag.IntVar(&o.crowd, "crowd", 10, "sandboxes at once where memory is measured")
	flag.BoolVar(&o.trace, "trace", false, "show the phases of a container's life instead, -runs of them")
	flag.IntVar(&o.pool, "pool", 0, "size of the daemon's pool of waiting agents")
	flag.IntVar(&o.manyVMs, "many-vms", 100, "VMs from a template at once")
	flag.StringVar(&o.only, "only", "", "measure only these parts, parted by commas: "+strings.Join(partNames(), ", "))
	flag.BoolVar(&o.asJSON, "json", false, "print the rows as JSON")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// parts of a run, in this order.
var parts = []struct {
	name string
	run  func(context.Context, *bench) ([]row, error)
}{
	{"life", benchContainers},
	{"exec", benchExec},
	{"vm", benchVMs},
	{"templates", benchTemplates},
	{"memory", benchMemory},
	{"many", benchMany},
	{"rate", benchRates},
	{"heap", benchHeap},
	{"output", benchOutput},
	{"execs", benchManyExecs},
}

func partNames() []string {
	var names []string
	for _, p := range parts {
		names = append(names, p.name)
	}
	return names
}

// inMemory is a file system in memory, as /run is on every host with systemd: there is what does not outlive a boot, of the daemon
// (--run-dir) and of the OCI runtimes (--root, by default below /run).
const inMemory = "/dev/shm"

// benchLimit bounds the whole run.
const benchLimit = 30 * time.Minute

func run(ctx context.Context, o options) error {
	ctx, cancel := context.WithTimeout(ctx, benchLimit)
	defer cancel()
	// Peers that dislike this host's hybrid cgroup mount run in a mount namespace without it, which is this thread's.
	runtime.LockOSThread()
	dir, err := os.MkdirTemp("", "sbxbench-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if o.runDir, err = os.MkdirTemp(inMemory, "sbxbench-"); err != nil {
		return err
	}
	defer os.RemoveAll(o.runDir)
	for _, p := range []*string{&o.bin, &o.cache} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	b := &bench{options: o, dir: dir}
	if b.d, err = startDaemon(ctx, o, dir); err != nil {
		return err
	}
	defer b.d.stop()
	if o.trace {
		return traceContainers(ctx, b)
	}
	if b.p, err = newPeers(ctx, b); err != nil {
		return err
	}
	defer b.p.clean()
	var rows []row
	for _, part := range parts {
		if o.only != "" && !slices.Contains(strings.Split(o.only, ","), part.name) {
			continue
		}
		r, err := part.run(ctx, b)
		if err != nil {
			return err
		}
		rows = append(rows, r...)
	}
	if o.asJSON {
		return json.NewEncoder(os.Stdout).Encode(rows)
	}
	printRows(rows)
	return nil
}

// bench is what the parts of a run share.
type bench struct {
	options
	dir string
	d   *daemon
	p   *peers
}

// row is one measured thing.
type row struct {
	Group string `json:"group"`
	Name  string `json:"name"`
	// Median, lowest and highest, in Unit.
	Median float64 `json:"median"`
	Min    float64 `json:"min"`
	Max    float64 `json:"max"`
	Unit   string  `json:"unit"`
	Runs   int     `json:"runs"`
	// Ours divided by this, medians; 0 where it means nothing.
	Ratio float64 `json:"ratio,omitempty"`
	// The same for ours from a pool.
	PoolRatio float64 `json:"poolRatio,omitempty"`
	// What the number includes.
	Includes string `json:"includes"`
}

func printRows(rows []row) {
	group := ""
	for _, r := range rows {
		if r.Group != group {
			group = r.Group
			fmt.Printf("\n%s\n%s\n", group, strings.Repeat("─", len(group)))
			fmt.Printf("%-22s %10s %21s %5s %10s  %s\n", "", "median", "min … max", "runs", "ours/this", "includes")
		}
		ratio := ""
		if r.Ratio != 0 {
			ratio = fmt.Sprintf("%.2f", r.Ratio)
		}
		if r.PoolRatio != 0 {
			ratio += fmt.Sprintf("|%.2f", r.PoolRatio)
		}
		fmt.Printf("%-22s %7.1f %-3s %9.1f … %-9.1f %5d %9s  %s\n", r.Name, r.Median, r.Unit, r.Min, r.Max, r.Runs, ratio, r.Includes)
	}
	fmt.Println()
}
