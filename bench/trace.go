package main

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/sandboxd/sandboxd/pkg/phase"
)

// call phases are the caller's: what the API's four calls take.
const callPhase = "API: "

// traceContainers shows where the time of a container's life goes: for each phase, on the daemon's side, the agent's and the
// caller's, when it begins and how long it takes. Medians; phases overlap, and one may lie within another.
func traceContainers(ctx context.Context, b *bench) error {
	type spanOf struct{ starts, took []float64 }
	phases := map[string]*spanOf{}
	begun := map[string]int64{} // lives by id
	note := func(r phase.Record) {
		begin, ours := begun[r.ID]
		if !ours {
			return
		}
		s := phases[r.Phase]
		if s == nil {
			s = &spanOf{}
			phases[r.Phase] = s
		}
		s.starts = append(s.starts, float64(r.Start-begin)/1e6)
		s.took = append(s.took, float64(r.Took)/1e6)
	}
	const warmUps = 3
	for i := range b.runs + warmUps {
		if b.pool > 0 {
			time.Sleep(poolPause)
		}
		records, err := tracedLife(ctx, b.d)
		if err != nil {
			return err
		}
		if i < warmUps {
			continue
		}
		begun[records[0].ID] = records[0].Start
		for _, r := range records {
			note(r)
		}
	}
	// The last phases of a life are written after its Delete has answered.
	time.Sleep(100 * time.Millisecond)
	f, err := os.Open(filepath.Join(filepath.Dir(b.d.stateDir), traceFile))
	if err != nil {
		return err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		var r phase.Record
		if err := json.Unmarshal(s.Bytes(), &r); err != nil {
			return fmt.Errorf("cannot read the trace: %w", err)
		}
		note(r)
	}
	names := make([]string, 0, len(phases))
	for name, s := range phases {
		slices.Sort(s.starts)
		slices.Sort(s.took)
		names = append(names, name)
	}
	median := func(v []float64) float64 { return v[len(v)/2] }
	slices.SortFunc(names, func(x, y string) int { return cmp.Compare(median(phases[x].starts), median(phases[y].starts)) })
	fmt.Printf("\none life of a container, /bin/true: medians of %d\n\n%9s %9s %9s %9s\n", b.runs, "from ms", "took ms", "10 % <", "90 % <")
	for _, name := range names {
		s := phases[name]
		indent := "    "
		if strings.HasPrefix(name, callPhase) {
			indent = ""
		}
		fmt.Printf("%9.2f %9.2f %9.2f %9.2f  %s%s\n", median(s.starts), median(s.took), s.took[len(s.took)/10], s.took[len(s.took)*9/10], indent, name)
	}
	return nil
}

// poolPause is enough for the daemon to make another sandbox ahead of time.
const poolPause = 300 * time.Millisecond

// tracedLife is run.
func tracedLife(ctx context.Context, d *daemon) ([]phase.Record, error) {
	start := phase.Now()
	w, err := d.runWorkload(ctx, container, "true")
	took := phase.Now() - start
	if err == nil && w.GetStatus().GetExitCode() != 0 {
		err = fmt.Errorf("it did not exit with 0: %s", w.GetStatus().GetMessage())
	}
	if err != nil {
		return nil, err
	}
	return []phase.Record{{ID: w.GetId(), Phase: callPhase + "run", Start: start, Took: took}}, nil
}
