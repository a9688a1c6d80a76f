package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"syscall"

	"github.com/mattn/go-runewidth"
	"golang.org/x/term"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// topOrder is a way to sort; those that use most, or are oldest, come first.
type topOrder struct {
	name string
	key  key
	less func(a, b *topRow) int
}

var topOrders = []topOrder{
	{"cpu", 'c', func(a, b *topRow) int { return cmp.Compare(b.cpu, a.cpu) }},
	{"memory", 'm', func(a, b *topRow) int {
		return cmp.Compare(b.usage.GetMemoryWorkingSetBytes(), a.usage.GetMemoryWorkingSetBytes())
	}},
	{"name", 'n', func(a, b *topRow) int { return cmp.Compare(a.workload.GetName(), b.workload.GetName()) }},
	{"age", 'a', func(a, b *topRow) int {
		return a.workload.GetCreatedAt().AsTime().Compare(b.workload.GetCreatedAt().AsTime())
	}},
	{"state", 's', func(a, b *topRow) int { return cmp.Compare(topState(a), topState(b)) }},
	{"isolation", 'i', func(a, b *topRow) int {
		return cmp.Compare(a.workload.GetStatus().GetIsolation(), b.workload.GetStatus().GetIsolation())
	}},
}

// topState puts what runs before what does not.
func topState(r *topRow) int {
	s := r.workload.GetStatus().GetState()
	switch s {
	case sandboxdv1.WorkloadState_WORKLOAD_STATE_RUNNING:
		return -2
	case sandboxdv1.WorkloadState_WORKLOAD_STATE_PAUSED:
		return -1
	}
	return int(s)
}

func sortNames() (names []string) {
	for _, o := range topOrders {
		names = append(names, o.name)
	}
	return names
}

func sortOrder(name string) (*topOrder, error) {
	i := slices.IndexFunc(topOrders, func(o topOrder) bool { return o.name == name })
	if i < 0 {
		return nil, fmt.Errorf("cannot use --sort %q: there are %s", name, strings.Join(sortNames(), ", "))
	}
	return &topOrders[i], nil
}

// topView is how the rows are shown.
type topView struct {
	order   *topOrder
	reverse bool
	// The first row that is shown.
	first int
}

// sort keeps those that are equal in the order of their ids, so that they don't jump.
func (v *topView) sort(rows []topRow) {
	slices.SortFunc(rows, func(a, b topRow) int {
		n := v.order.less(&a, &b)
		if v.reverse {
			n = -n
		}
		return cmp.Or(n, cmp.Compare(a.workload.GetId(), b.workload.GetId()))
	})
}

// press does what a key asks for; its error ends the view. In raw mode ctrl-C and ctrl-\ are keys like others.
func (v *topView) press(k key) error {
	switch k {
	case 'q', 'Q':
		return errQuit
	case 0x03:
		return signalExit(syscall.SIGINT)
	case 0x1c:
		return signalExit(syscall.SIGQUIT)
	case 'r':
		v.reverse = !v.reverse
	case 'k', keyUp:
		v.first--
	case 'j', keyDown:
		v.first++
	default:
		if i := slices.IndexFunc(topOrders, func(o topOrder) bool { return o.key == k }); i >= 0 {
			v.order, v.first = &topOrders[i], 0
		}
	}
	return nil
}

// render is the whole screen: as many lines as it has, none wider than it is. Nothing of it is a control character that others
// chose: table cleans each cell.
func (v *topView) render(t *topLook, rows, columns int) ([]string, error) {
	running := 0
	for i := range t.rows {
		if t.rows[i].usage != nil {
			running++
		}
	}
	direction := ""
	if v.reverse {
		direction = ", reversed"
	}
	lines := []string{fmt.Sprintf("sandboxctl top  %s  %s, %d running  by %s%s  (q leaves)",
		t.at.Format("15:04:05"), plural(len(t.rows), "workload"), running, v.order.name, direction)}
	room := max(rows-2, 0)
	v.first = max(min(v.first, len(t.rows)-room), 0)
	shown := t.rows[v.first:min(v.first+room, len(t.rows))]
	cells := make([][]string, 0, len(shown))
	for i := range shown {
		cells = append(cells, shown[i].cells(t.at))
	}
	var out bytes.Buffer
	if err := table(&out, topHeading, cells); err != nil {
		return nil, err
	}
	lines = append(lines, strings.Split(strings.TrimSuffix(out.String(), "\n"), "\n")...)
	lines = lines[:min(len(lines), rows)]
	for i, line := range lines {
		lines[i] = runewidth.Truncate(line, columns, "")
	}
	return lines, nil
}

const (
	// The other screen, so that what was there before comes back; no cursor; and no line ever goes over into the next.
	screenOn  = "\x1b[?1049h\x1b[?25l\x1b[?7l"
	screenOff = "\x1b[?7h\x1b[?25h\x1b[?1049l"
	// Home; each line is cleared to its end, and the screen below the last: less flicker than clearing first.
	screenHome, lineEnd, screenEnd = "\x1b[H", "\x1b[K", "\x1b[J"
)

// screen is the terminal while the view has it.
type screen struct {
	keyboard *terminal
	size     *terminal
	out      io.Writer
}

func openScreen(in io.Reader, out io.Writer) (*screen, error) {
	s := &screen{keyboard: terminalOf(in), size: terminalOf(out), out: out}
	if err := s.keyboard.makeRaw(); err != nil {
		return nil, fmt.Errorf("cannot use the terminal: %w", err)
	}
	if _, err := io.WriteString(out, screenOn); err != nil {
		return nil, errors.Join(err, s.close())
	}
	return s, nil
}

func (s *screen) close() error {
	_, err := io.WriteString(s.out, screenOff)
	s.keyboard.restore()
	return err
}

func (s *screen) draw(v *topView, t *topLook) error {
	columns, rows, err := term.GetSize(s.size.fd)
	if err != nil || columns < 1 || rows < 1 {
		columns, rows = 80, 24
	}
	lines, err := v.render(t, rows, columns)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	out.WriteString(screenHome)
	// In raw mode a new line does not return by itself.
	out.WriteString(strings.Join(lines, lineEnd+"\r\n"))
	out.WriteString(lineEnd + screenEnd)
	_, err = s.out.Write(out.Bytes())
	return err
}
