package workload

import (
	"context"
	"time"
)

// LogOptions select part of a workload's output.
type LogOptions struct {
	Follow bool
	// Last lines; negative means all.
	Tail  int
	Since time.Time
	// Instead of what the process wrote: what the sandbox's own kernel and its virtual machine monitor said.
	Console bool
}

// LogEntry is one piece of output as it was read, not cut at line ends.
type LogEntry struct {
	Time   time.Time
	Stream Stream
	Data   []byte
}

// Logs calls fn with the output so far, and with Follow goes on until the workload has ended.
func (m *Manager) Logs(ctx context.Context, ref string, o LogOptions, fn func(LogEntry) error) error {
	e, err := m.find(ref)
	if err != nil {
		return err
	}
	if o.Console {
		return e.consoleLog(o, fn)
	}
	log, err := e.output()
	if err != nil {
		return err
	}
	pos, skip := int64(0), 0
	if o.Tail >= 0 {
		if pos, skip, err = log.tail(o.Tail); err != nil {
			return e.logError(err)
		}
	}
	emit := func(le LogEntry) error {
		le.Data, skip = le.Data[min(skip, len(le.Data)):], 0
		if le.Time.Before(o.Since) || len(le.Data) == 0 {
			return nil
		}
		return fn(le)
	}
	if !o.Follow {
		_, err := log.read(ctx, pos, emit)
		return e.logError(err)
	}
	return e.followLog(ctx, log, pos, func(rec record) bool {
		return terminal(rec.Status.State) || rec.Status.State == StateDeleting
	}, emit)
}

// followLog calls fn with the records from pos on, those that are still to come included, until over says that no more
// will.
func (e *entry) followLog(ctx context.Context, log *outputLog, pos int64, over func(record) bool, fn func(LogEntry) error) error {
	for {
		// In this order: what is over before the read has all its output in the log by then.
		_, _, grown := log.end()
		rec, _, changed := e.peek()
		done := over(rec)
		var err error
		if pos, err = log.read(ctx, pos, fn); err != nil {
			return e.logError(err)
		}
		if done {
			return nil
		}
		select {
		case <-grown:
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-e.m.ctx.Done():
			return errClosing
		}
	}
}
