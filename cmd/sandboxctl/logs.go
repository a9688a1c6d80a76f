package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strconv"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/protobuf/types/known/timestamppb"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
	"github.com/sandboxd/sandboxd/pkg/client"
)

// timestampFormat keeps columns aligned: RFC 3339 with all nine digits of a second.
const timestampFormat = "2006-01-02T15:04:05.000000000Z07:00"

func (a *app) logsCommand() *cobra.Command {
	var follow, timestamps, console bool
	var tail, since string
	cmd := &cobra.Command{
		Use:   "logs [flags] WORKLOAD",
		Short: "Show what a workload wrote",
		Long: `Logs prints what the process wrote to standard output and standard error, each to the same stream here. A workload's log
keeps the last --log-size of it (see create); what is gone before or between is said on standard error.`,
		Example: `  sandboxctl logs -f --tail 100 web
  sandboxctl logs --console web
  sandboxctl logs --since 10m --timestamps web 2>errors.txt`,
		Args: exactArgs(1, "WORKLOAD"),
		RunE: a.call(func(ctx context.Context, c *client.Client, args []string) error {
			request := &sandboxdv1.StreamLogsRequest{Id: args[0], Follow: follow, Console: console}
			var err error
			if request.Tail, err = parseTail(tail); err != nil {
				return err
			}
			if request.Since, err = parseTime("since", since, time.Now()); err != nil {
				return err
			}
			return a.logs(ctx, c, request, timestamps)
		}),
	}
	f := cmd.Flags()
	boolFlag(f, &follow, "follow", "f", "go on until the workload ends")
	boolFlag(f, &timestamps, "timestamps", "t", "put the time before each line")
	boolFlag(f, &console, "console", "", "instead, what a VM's kernel and QEMU said: panics, errors, why it ended")
	f.StringVar(&tail, "tail", "all", "only the last so many lines")
	f.StringVar(&since, "since", "", "only from a time on: 2006-01-02T15:04:05Z, or 10m for ten minutes ago")
	return cmd
}

func (a *app) logs(ctx context.Context, c *client.Client, request *sandboxdv1.StreamLogsRequest, timestamps bool) error {
	out, errOut := a.stdout, a.stderr
	var lines [2]*stampedWriter
	if timestamps || a.json() {
		lines = [2]*stampedWriter{{w: out, fresh: true}, {w: errOut, fresh: true}}
	}
	return c.Logs(ctx, request, func(r *sandboxdv1.StreamLogsResponse) error {
		if a.json() {
			return a.printJSONLine(r)
		}
		if n := r.GetDroppedBytes(); n > 0 {
			_, err := fmt.Fprintf(errOut, "sandboxctl: %d bytes of output are gone here: the log keeps the last of it (--log-size)\n", n)
			return err
		}
		which, w := 0, out
		if r.GetStream() == sandboxdv1.OutputStream_OUTPUT_STREAM_STDERR {
			which, w = 1, errOut
		}
		if timestamps {
			return lines[which].write(r.GetTime().AsTime(), r.GetData())
		}
		_, err := w.Write(r.GetData())
		return err
	})
}

// stampedWriter puts before each line the time of the piece in which it began; pieces are not cut at line ends.
type stampedWriter struct {
	w     io.Writer
	fresh bool
}

func (s *stampedWriter) write(t time.Time, data []byte) error {
	var out bytes.Buffer
	for line := range bytes.Lines(data) {
		if s.fresh {
			out.WriteString(t.UTC().Format(timestampFormat))
			out.WriteByte(' ')
		}
		out.Write(line)
		s.fresh = line[len(line)-1] == '\n'
	}
	_, err := s.w.Write(out.Bytes())
	return err
}

// parseTail: nil is all.
func parseTail(s string) (*uint32, error) {
	if s == "all" || s == "" {
		return nil, nil
	}
	n, err := strconv.ParseUint(s, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("cannot use --tail %q: write a number of lines, or all", s)
	}
	lines := uint32(n)
	return &lines, nil
}

// parseTime reads a time, or how long before now; empty is nil.
func parseTime(flag, s string, now time.Time) (*timestamppb.Timestamp, error) {
	if s == "" {
		return nil, nil
	}
	if d, err := time.ParseDuration(s); err == nil {
		return timestamppb.New(now.Add(-d.Abs())), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", time.DateTime, time.DateOnly} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return timestamppb.New(t), nil
		}
	}
	if seconds, err := strconv.ParseFloat(s, 64); err == nil && seconds >= 0 && seconds < 1e11 {
		return timestamppb.New(time.Unix(0, int64(seconds*1e9))), nil
	}
	return nil, errors.New("cannot use --" + flag + " " + strconv.Quote(s) + ": write a time such as 2006-01-02T15:04:05Z, or 10m for ten minutes ago")
}
