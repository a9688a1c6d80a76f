package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"time"

	"google.golang.org/protobuf/encoding/protojson"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

// topLook is what one look at the daemon showed.
type topLook struct {
	filter *filter
	// When, by this host's clock.
	at   time.Time
	rows []topRow
	// By id, for the shares of the next look.
	before map[string]*sandboxdv1.Usage
}

// topRow is a workload; usage is nil of one that does not run.
type topRow struct {
	workload *sandboxdv1.Workload
	usage    *sandboxdv1.Usage
	// Of one processor, in percent; below 0 when it is not known yet.
	cpu float64
}

// look asks what there is and what it uses: two calls, or two for each thousand.
func (t *topLook) look(ctx context.Context, c *client.Client) error {
	request := t.filter.request
	request.PageSize = 1000
	list, err := t.filter.list(ctx, c)
	if err != nil {
		return err
	}
	usages, err := c.ListUsage(ctx, &sandboxdv1.ListUsageRequest{Labels: request.GetLabels(), Isolation: request.GetIsolation()})
	if err != nil {
		return err
	}
	now := make(map[string]*sandboxdv1.Usage, len(usages))
	for _, u := range usages {
		now[u.GetId()] = u
	}
	rows := make([]topRow, 0, len(list))
	for _, w := range list {
		u := now[w.GetId()]
		rows = append(rows, topRow{workload: w, usage: u, cpu: cpuPercent(t.before[w.GetId()], u)})
	}
	t.at, t.rows, t.before = time.Now(), rows, now
	return nil
}

// cpuPercent is in percent of one processor, between two looks; -1 if there are not two.
func cpuPercent(before, now *sandboxdv1.Usage) float64 {
	if before == nil || now == nil {
		return -1
	}
	wall := now.GetTime().AsTime().Sub(before.GetTime().AsTime())
	used := now.GetCpuTime().AsDuration() - before.GetCpuTime().AsDuration()
	if wall <= 0 || used < 0 { // less than before: it was started anew
		return -1
	}
	return 100 * used.Seconds() / wall.Seconds()
}

// guestUsed is what a guest claims to use of its memory.
func (r *topRow) guestUsed() uint64 {
	total, available := r.usage.GetGuestMemoryTotalBytes(), r.usage.GetGuestMemoryAvailableBytes()
	return total - min(available, total) // it may say what it likes
}

func (r *topRow) age(now time.Time) time.Duration {
	return max(now.Sub(r.workload.GetCreatedAt().AsTime()), 0)
}

var topHeading = []string{"ID", "NAME", "ISOLATION", "STATE", "AGE", "CPU", "MEMORY", "LIMIT", "GUEST", "CACHE", "PIDS", "RULE", "REASON"}

func (r *topRow) cells(now time.Time) []string {
	w, s := r.workload, r.workload.GetStatus()
	cells := []string{short(w.GetId()), w.GetName(), wall(s), stateText(s.GetState()), shortAge(r.age(now))}
	if u := r.usage; u != nil {
		cpu := "-"
		if r.cpu >= 0 {
			cpu = fmt.Sprintf("%.1f%%", r.cpu)
		}
		cells = append(cells, cpu, size(u.GetMemoryWorkingSetBytes()), limit(u.GetMemoryLimitBytes()), limit(r.guestUsed()),
			size(u.GetMemoryCacheBytes()), fmt.Sprint(u.GetPids()))
	} else {
		cells = append(cells, "-", "-", "-", "-", "-", "-")
	}
	return append(cells, s.GetDecision().GetRule(), s.GetDecision().GetReason())
}

// shortAge is an age in four characters or so.
func shortAge(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", d/time.Second)
	case d < time.Hour:
		return fmt.Sprintf("%dm", d/time.Minute)
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", d/time.Hour)
	}
	return fmt.Sprintf("%dd", d/(24*time.Hour))
}

// topJSON is a line of --format json.
type topJSON struct {
	Time      time.Time        `json:"time"`
	Workloads []topJSONElement `json:"workloads"`
}

type topJSONElement struct {
	ID         string            `json:"id"`
	Name       string            `json:"name"`
	Labels     map[string]string `json:"labels,omitempty"`
	Isolation  string            `json:"isolation"`
	State      string            `json:"state"`
	CreatedAt  time.Time         `json:"createdAt"`
	Rule       string            `json:"rule"`
	Reason     string            `json:"reason"`
	CPUPercent *float64          `json:"cpuPercent,omitempty"`
	Usage      json.RawMessage   `json:"usage,omitempty"`
}

func (a *app) printTopJSON(t *topLook) error {
	line := topJSON{Time: t.at, Workloads: make([]topJSONElement, 0, len(t.rows))}
	for i := range t.rows {
		r := &t.rows[i]
		w, s := r.workload, r.workload.GetStatus()
		e := topJSONElement{
			ID: w.GetId(), Name: w.GetName(), Labels: w.GetLabels(), Isolation: isolationText(s.GetIsolation()), State: stateText(s.GetState()),
			CreatedAt: w.GetCreatedAt().AsTime(), Rule: s.GetDecision().GetRule(), Reason: s.GetDecision().GetReason(),
		}
		if r.cpu >= 0 {
			e.CPUPercent = &r.cpu
		}
		if r.usage != nil {
			b, err := protojson.Marshal(r.usage)
			if err != nil {
				return err
			}
			e.Usage = b
		}
		line.Workloads = append(line.Workloads, e)
	}
	b, err := json.Marshal(line)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := json.Compact(&out, b); err != nil {
		return err
	}
	out.WriteByte('\n')
	_, err = a.stdout.Write(out.Bytes())
	return err
}
