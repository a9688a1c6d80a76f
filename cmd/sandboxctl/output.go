package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

const (
	formatTable = "table"
	formatJSON  = "json"
)

func (a *app) json() bool { return a.format == formatJSON }

// printJSON prints one message, for people and jq alike. protojson varies its white space on purpose, so it is set anew.
func (a *app) printJSON(m proto.Message) error {
	b, err := protojson.Marshal(m)
	if err != nil {
		return err
	}
	return a.printRawJSON(b)
}

func (a *app) printRawJSON(b []byte) error {
	var out bytes.Buffer
	if err := json.Indent(&out, b, "", "  "); err != nil {
		return err
	}
	out.WriteByte('\n')
	_, err := a.stdout.Write(out.Bytes())
	return err
}

// printJSONLine prints one message of a stream.
func (a *app) printJSONLine(m proto.Message) error {
	b, err := protojson.Marshal(m)
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

// printJSONArray prints a list.
func printJSONArray[M proto.Message](a *app, list []M) error {
	all := make([]json.RawMessage, 0, len(list))
	for _, m := range list {
		b, err := protojson.Marshal(m)
		if err != nil {
			return err
		}
		all = append(all, b)
	}
	b, err := json.Marshal(all)
	if err != nil {
		return err
	}
	return a.printRawJSON(b)
}

// table prints rows under a heading, columns aligned.
func table(w io.Writer, heading []string, rows [][]string) error {
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	if len(heading) > 0 {
		fmt.Fprintln(tw, strings.Join(heading, "\t"))
	}
	for _, row := range rows {
		cells := make([]string, len(row))
		for i, cell := range row {
			cells[i] = clean(cell)
		}
		fmt.Fprintln(tw, strings.Join(cells, "\t"))
	}
	return tw.Flush()
}

// clean keeps what others chose, names and messages, from moving the cursor of whoever looks at it.
func clean(s string) string {
	return strings.Map(func(r rune) rune {
		if r == '\n' || r == '\t' {
			return ' '
		}
		return printable(r)
	}, s)
}

func printable(r rune) rune {
	if unicode.IsControl(r) || unicode.Is(unicode.Bidi_Control, r) {
		return '\uFFFD'
	}
	return r
}

// isolationText is how people say it.
func isolationText(i sandboxdv1.Isolation) string {
	switch i {
	case sandboxdv1.Isolation_ISOLATION_AUTO:
		return "auto"
	case sandboxdv1.Isolation_ISOLATION_CONTAINER:
		return "container"
	case sandboxdv1.Isolation_ISOLATION_VM:
		return "vm"
	}
	return "-"
}

func stateText(s sandboxdv1.WorkloadState) string {
	return strings.ToLower(strings.TrimPrefix(s.String(), "WORKLOAD_STATE_"))
}

// age is a duration as one says it: 5 seconds, 3 minutes, 2 days.
func age(d time.Duration) string {
	for _, unit := range []struct {
		size time.Duration
		name string
	}{{24 * time.Hour, "day"}, {time.Hour, "hour"}, {time.Minute, "minute"}} {
		if n := int(d / unit.size); n > 0 {
			return plural(n, unit.name)
		}
	}
	return plural(max(int(d/time.Second), 0), "second")
}

func plural(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// size is a number of bytes as one says it, in powers of 1024.
func size(n uint64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%dB", n)
	}
	return fmt.Sprintf("%.1f%s", f, units[i])
}
