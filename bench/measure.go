package main

import (
	"context"
	"fmt"
	"os"
	"slices"
	"time"
)

// subject is one way of doing what a group measures.
type subject struct {
	name, includes string
	// do runs a command in a sandbox and answers with its exit code. command is "true" or "exit7".
	do func(ctx context.Context, command string) (int, error)
}

// pooledName is the subject that is ours, too, from a pool.
const pooledName = "the same from a pool"

// onceLimit bounds one measured run.
const onceLimit = 2 * time.Minute

// measure lets the subjects take turns, so that a drift of the machine meets them all alike. The first is ours: the
// others' rows carry the ratio to it.
func measure(ctx context.Context, group string, runs int, subjects []subject) ([]row, error) {
	for _, s := range subjects {
		fmt.Fprintf(os.Stderr, "%s: checking %s\n", group, s.name)
		for command, want := range map[string]int{"exit7": 7, "true": 0} {
			if _, err := once(ctx, s, command, want); err != nil {
				return nil, err
			}
		}
	}
	fmt.Fprintf(os.Stderr, "%s: measuring %d × %d runs\n", group, len(subjects), runs)
	times := make([][]float64, len(subjects))
	for range runs {
		for i, s := range subjects {
			d, err := once(ctx, s, "true", 0)
			if err != nil {
				return nil, err
			}
			times[i] = append(times[i], float64(d.Microseconds())/1000)
		}
	}
	rows := make([]row, len(subjects))
	for i, s := range subjects {
		rows[i] = newRow(group, s.name, "ms", s.includes, times[i])
	}
	pool := slices.IndexFunc(subjects, func(s subject) bool { return s.name == pooledName })
	for i := range rows[1:] {
		r := &rows[1+i]
		r.Ratio = rows[0].Median / r.Median
		if pool > 0 && 1+i != pool {
			r.PoolRatio = rows[pool].Median / r.Median
		}
	}
	return rows, nil
}

func once(ctx context.Context, s subject, command string, want int) (time.Duration, error) {
	ctx, cancel := context.WithTimeout(ctx, onceLimit)
	defer cancel()
	start := time.Now()
	code, err := s.do(ctx, command)
	took := time.Since(start)
	if err != nil {
		return 0, fmt.Errorf("cannot run %s: %w", s.name, err)
	}
	if code != want {
		return 0, fmt.Errorf("%s: %s exited with %d, want %d: its times would mean nothing", s.name, command, code, want)
	}
	return took, nil
}

func newRow(group, name, unit, includes string, values []float64) row {
	slices.Sort(values)
	return row{
		Group: group, Name: name, Unit: unit, Includes: includes, Runs: len(values),
		Median: values[len(values)/2], Min: values[0], Max: values[len(values)-1],
	}
}
