package main

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/mattn/go-runewidth"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/timestamppb"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

var topNow = time.Unix(1_700_000_000, 0)

func topRowOf(name string, cpu float64, memory uint64, age time.Duration) topRow {
	return topRow{
		workload: &sandboxdv1.Workload{
			Id: "id-" + name, Name: name, CreatedAt: timestamppb.New(topNow.Add(-age)),
			Status: &sandboxdv1.WorkloadStatus{
				State: sandboxdv1.WorkloadState_WORKLOAD_STATE_RUNNING, Isolation: sandboxdv1.Isolation_ISOLATION_VM,
				Decision: &sandboxdv1.Decision{Rule: "rule", Reason: "because"},
			},
		},
		usage: &sandboxdv1.Usage{MemoryWorkingSetBytes: memory, GuestMemoryTotalBytes: 1 << 20, GuestMemoryAvailableBytes: 1 << 60},
		cpu:   cpu,
	}
}

func topNames(rows []topRow) (names []string) {
	for i := range rows {
		names = append(names, rows[i].workload.GetName())
	}
	return names
}

func TestTopSorts(t *testing.T) {
	rows := []topRow{topRowOf("b", 5, 1, time.Hour), topRowOf("a", -1, 3, time.Minute), topRowOf("c", 90, 2, time.Second)}
	for keys, want := range map[string]string{
		"c": "c b a", "m": "a c b", "n": "a b c", "a": "b a c", "cr": "a b c", "s": "a b c", "i": "a b c", "x": "c b a",
	} {
		order, err := sortOrder("cpu")
		if err != nil {
			t.Fatal(err)
		}
		v := topView{order: order}
		for _, k := range keysIn([]byte(keys)) {
			if err := v.press(k); err != nil {
				t.Fatal(err)
			}
		}
		list := slices.Clone(rows)
		v.sort(list)
		if got := strings.Join(topNames(list), " "); got != want {
			t.Errorf("%s: %s, want %s", keys, got, want)
		}
	}
	if _, err := sortOrder("size"); err == nil {
		t.Error("an order that does not exist is taken")
	}
}

func TestTopKeys(t *testing.T) {
	if got := keysIn([]byte("j\x1b[A\x1bOB\x1b[1;5Aq\x1b[")); !slices.Equal(got, []key{'j', keyUp, keyDown, keyUp, 'q'}) {
		t.Errorf("%v", got)
	}
	for k, want := range map[key]error{'q': errQuit, 3: exitStatus(130), 0x1c: exitStatus(131)} {
		if err := (&topView{order: &topOrders[0]}).press(k); !errors.Is(err, want) {
			t.Errorf("key %d: %v, want %v", k, err, want)
		}
	}
}

// Whatever others named their workloads and rules, and whatever size the terminal has: no line is wider, there are no more than
// fit, and nothing of them is obeyed.
func TestTopFitsAndObeysNobody(t *testing.T) {
	var rows []topRow
	for i := range 50 {
		r := topRowOf(fmt.Sprintf("w%02d\x1b[2J\x07\u202e\u009b31m\n\tx", i), float64(i), 1, time.Hour)
		r.workload.Status.Decision.Reason = strings.Repeat("漢字é\r", 40)
		rows = append(rows, r)
	}
	look := &topLook{at: topNow, rows: rows}
	v := topView{order: &topOrders[0]}
	v.sort(rows)
	for _, size := range [][2]int{{24, 80}, {5, 200}, {2, 10}, {1, 1}, {100, 300}} {
		lines, err := v.render(look, size[0], size[1])
		if err != nil {
			t.Fatal(err)
		}
		if want := min(size[0], 52); len(lines) != want {
			t.Errorf("%v: %d lines, want %d", size, len(lines), want)
		}
		for _, line := range lines {
			if w := runewidth.StringWidth(line); w > size[1] {
				t.Errorf("%v: a line is %d wide: %q", size, w, line)
			}
			if strings.ContainsFunc(line, func(r rune) bool { return printable(r) != r }) {
				t.Errorf("%v: %q", size, line)
			}
		}
	}
	// Moving ends at both ends, also when the terminal grows.
	for range 100 {
		_ = v.press('j')
	}
	lines, err := v.render(look, 12, 80)
	if err != nil || v.first != 40 || !strings.Contains(lines[11], "w00") {
		t.Errorf("first %d, %v: %q", v.first, err, lines)
	}
	if _, err := v.render(look, 60, 80); err != nil || v.first != 0 {
		t.Errorf("first %d, %v", v.first, err)
	}
}

// A share needs two looks at the same run; a guest cannot make its own number absurd.
func TestTopShares(t *testing.T) {
	at := func(seconds int64, used time.Duration) *sandboxdv1.Usage {
		return &sandboxdv1.Usage{Time: &timestamppb.Timestamp{Seconds: seconds}, CpuTime: durationpb.New(used)}
	}
	for _, c := range []struct {
		before, now *sandboxdv1.Usage
		want        float64
	}{
		{nil, at(1, 1), -1}, {at(1, 1), nil, -1}, {at(1, time.Second), at(3, 2*time.Second), 50},
		{at(1, time.Second), at(3, 0), -1}, {at(3, 0), at(3, 0), -1},
	} {
		if got := cpuPercent(c.before, c.now); got != c.want {
			t.Errorf("%v %v: %v, want %v", c.before, c.now, got, c.want)
		}
	}
	r := topRowOf("x", 0, 0, 0)
	if n := r.guestUsed(); n != 0 {
		t.Errorf("a guest that has more than everything uses %d", n)
	}
}
