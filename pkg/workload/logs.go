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
	// So many bytes that would come here are gone: the log has a limit. Then there is no Data.
	Dropped uint64
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
	at, skip := logCursor{}, 0
	if o.Tail >= 0 {
		if at, skip, err = log.tail(o.Tail); err != nil {
			return e.logError(err)
		}
	}
	emit := func(le LogEntry) error {
		if le.Dropped > 0 {
			skip = 0
			return fn(le)
		}
		le.Data, skip = le.Data[min(skip, len(le.Data)):], 0
		if le.Time.Before(o.Since) || len(le.Data) == 0 {
			return nil
		}
		return fn(le)
	}
	if !o.Follow {
		_, err := log.read(ctx, at, emit)
		return e.logError(err)
	}
	return e.followLog(ctx, log, at, func(rec record) bool {
		return terminal(rec.Status.State) || rec.Status.State == StateDeleting
	}, emit)
}

// followLog calls fn with the records from at on, those that are still to come included, until over says that no more
// will.
func (e *entry) followLog(ctx context.Context, log *outputLog, at logCursor, over func(record) bool, fn func(LogEntry) error) error {
	for {
		// In this order: what is over before the read has all its output in the log by then.
		_, grown := log.end()
		rec, _, changed := e.peek()
		done := over(rec)
		var err error
		if at, err = log.read(ctx, at, fn); err != nil {
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
