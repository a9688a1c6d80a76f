package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/sandboxd/sandboxd/pkg/client"
)

const (
	// topEvery is the time between two looks, unless told otherwise; topLeast what --interval may not go below.
	topEvery = 2 * time.Second
	topLeast = 100 * time.Millisecond
)

// errQuit ends the live view as its user wants.
var errQuit = errors.New("quit")

type topOptions struct {
	filters  []string
	sort     string
	reverse  bool
	once     bool
	looks    uint
	interval time.Duration
}

func (a *app) topCommand() *cobra.Command {
	var o topOptions
	cmd := &cobra.Command{
		Use:   "top [flags]",
		Short: "Watch what workloads use, live",
		Long: `Top shows the workloads that run (with a filter on their state, others), those that use most first, and looks again every two seconds: two calls of the daemon
for each look, however many there are. CPU is in percent of one processor. MEMORY is the host's count, without file pages that
were not used lately: of a VM it is all of its QEMU, the guest's memory and the monitor's own together, which is as far as a
host can tell them apart; GUEST is what the guest says that it uses of its own, a claim. RULE and REASON are the policy's.

On a terminal the keys are: c, m, n, a, s, i to sort by cpu, memory, name, age, state, isolation; r to reverse; up, down or
k, j to move; q to leave. Elsewhere each look is a table of its own, or with --format json a line of JSON.`,
		Example: `  sandboxctl top
  sandboxctl top --sort memory --filter tenant=shop --filter isolation=vm
  sandboxctl top --once --format json | jq '.workloads[] | select(.cpuPercent > 50) | .name'`,
		Args: noArgs,
		RunE: a.call(func(ctx context.Context, c *client.Client, _ []string) error { return a.top(ctx, c, o) }),
	}
	cmd.Flags().StringArrayVar(&o.filters, "filter", nil, "label=KEY[=VALUE], tenant=NAME (the label tenant), state=STATE, isolation=container|vm or name=PART; may be repeated")
	cmd.Flags().StringVar(&o.sort, "sort", "cpu", strings.Join(sortNames(), ", "))
	boolFlag(cmd.Flags(), &o.reverse, "reverse", "r", "the other way round")
	cmd.Flags().BoolVar(&o.once, "once", false, "look once, print and exit: -n 1")
	cmd.Flags().UintVarP(&o.looks, "looks", "n", 0, "print so many looks and exit; 0 goes on until interrupted")
	cmd.Flags().DurationVar(&o.interval, "interval", topEvery, "time between two looks")
	return cmd
}

func (a *app) top(ctx context.Context, c *client.Client, o topOptions) error {
	for i, f := range o.filters {
		if tenant, ok := strings.CutPrefix(f, "tenant="); ok {
			o.filters[i] = "label=tenant=" + tenant
		}
	}
	f, err := parseFilters(o.filters)
	if err != nil {
		return err
	}
	if len(f.request.States) == 0 {
		f.request.States = active
	}
	order, err := sortOrder(o.sort)
	if err != nil {
		return err
	}
	if o.interval < topLeast {
		return fmt.Errorf("cannot use --interval %v: it is at least %v", o.interval, topLeast)
	}
	if o.once {
		o.looks = 1
	}
	t := &topLook{filter: f}
	view := topView{order: order, reverse: o.reverse}
	if o.looks == 0 && !a.json() && isTerminal(a.stdout) && terminalOf(a.stdin).is {
		return a.topLive(ctx, c, t, &view, o.interval)
	}
	return a.topPlain(ctx, c, t, &view, o)
}

// topPlain prints one look after the other. A CPU share needs two: before the first that is shown is another.
func (a *app) topPlain(ctx context.Context, c *client.Client, t *topLook, view *topView, o topOptions) error {
	if err := t.look(ctx, c); err != nil {
		return err
	}
	pause := min(statsOnce, o.interval)
	for n := uint(1); ; n++ {
		if err := sleep(ctx, pause); err != nil {
			return err
		}
		if err := t.look(ctx, c); err != nil {
			return err
		}
		view.sort(t.rows)
		if err := a.printTop(t); err != nil {
			return err
		}
		if o.looks > 0 && n == o.looks {
			return nil
		}
		pause = o.interval
	}
}

func (a *app) printTop(t *topLook) error {
	if a.json() {
		return a.printTopJSON(t)
	}
	rows := make([][]string, 0, len(t.rows))
	for i := range t.rows {
		rows = append(rows, t.rows[i].cells(t.at))
	}
	if err := table(a.stdout, topHeading, rows); err != nil {
		return err
	}
	_, err := fmt.Fprintln(a.stdout)
	return err
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}

// topLive draws until it is told to end. However that comes, by a key, a signal, the daemon's end or the terminal's, the
// terminal is given back as it was.
func (a *app) topLive(ctx context.Context, c *client.Client, t *topLook, view *topView, every time.Duration) (err error) {
	screen, err := openScreen(a.stdin, a.stdout)
	if err != nil {
		return err
	}
	defer func() {
		err = errors.Join(err, screen.close())
		if errors.Is(err, errQuit) {
			err = nil
		}
	}()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, syscall.SIGWINCH)
	defer signal.Stop(resized)
	keys := make(chan key)
	go readKeys(ctx, a.stdin, keys, cancel)
	looks := make(chan *topLook)
	go lookOften(ctx, c, t, every, looks, cancel)

	var shown *topLook
	for {
		if shown != nil {
			view.sort(shown.rows)
			if err := screen.draw(view, shown); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case shown = <-looks:
		case <-resized:
		case k := <-keys:
			if err := view.press(k); err != nil {
				return err
			}
		}
	}
}

// lookOften hands on each look, a copy of its own; the second follows the first soon, for its CPU shares.
func lookOften(ctx context.Context, c *client.Client, t *topLook, every time.Duration, looks chan<- *topLook, fail context.CancelCauseFunc) {
	pause := min(statsOnce, every)
	for {
		if err := t.look(ctx, c); err != nil {
			fail(err)
			return
		}
		done := *t
		select {
		case looks <- &done:
		case <-ctx.Done():
			return
		}
		if sleep(ctx, pause) != nil {
			return
		}
		pause = every
	}
}

// key is one that was pressed: a character, or one of those below.
type key rune

const (
	keyUp   key = -1
	keyDown key = -2
)

// readKeys ends the view when the terminal has gone. It stays behind in a read that nobody can end; the program ends then.
func readKeys(ctx context.Context, from io.Reader, keys chan<- key, fail context.CancelCauseFunc) {
	buf := make([]byte, 64)
	for {
		n, err := from.Read(buf)
		for _, k := range keysIn(buf[:n]) {
			select {
			case keys <- k:
			case <-ctx.Done():
				return
			}
		}
		if err != nil {
			fail(signalExit(syscall.SIGHUP))
			return
		}
	}
}

// keysIn takes what one read brought apart: arrows come as ESC [ A or ESC O A; other sequences mean nothing here.
func keysIn(b []byte) (keys []key) {
	for len(b) > 0 {
		if b[0] != 0x1b {
			keys, b = append(keys, key(b[0])), b[1:]
			continue
		}
		if len(b) < 3 || (b[1] != '[' && b[1] != 'O') {
			return keys
		}
		end := 2
		for end < len(b)-1 && (b[end] < 0x40 || b[end] > 0x7e) {
			end++
		}
		switch b[end] {
		case 'A':
			keys = append(keys, keyUp)
		case 'B':
			keys = append(keys, keyDown)
		}
		b = b[end+1:]
	}
	return keys
}
