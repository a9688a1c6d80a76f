package workload

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/fault"
)

// outputLog is a workload's output on disk: records appended in the order they were read from the agent, each with the
// count of output bytes before it. That count is what the agent is asked to go on from after a restart, so a record
// that is whole is never asked for again, and one that is torn always is.
//
// The records lie in segments, files that are named after the position of their first record; positions only grow. Once the
// segments together are larger than the limit the oldest goes: that is what is lost, and who reads across it is told.
//
// A record is a header of logHeaderLen bytes, little endian, and the data:
//
//	0  uint32  length of the data
//	4  uint32  CRC-32C of everything after it
//	8  uint64  output bytes before this record
//	16 int64   time, nanoseconds since 1970
//	24 uint8   stream; 7 zero bytes
type outputLog struct {
	dir string

	mu sync.Mutex // guards what follows
	// Oldest first; the last one is written to. There is always one.
	segments []*logSegment
	// Of all segments together, on the disk; a log of one segment may be larger.
	limit int64
	// Closed and replaced whenever the log grows, and when it is closed.
	changed chan struct{}
	closed  bool
}

// logCursor is a place in a log: where a record begins, and how much output is before it. The zero value is the beginning.
type logCursor struct {
	pos    int64
	offset uint64
}

const (
	logHeaderLen = 32
	// maxLogRecord bounds a record's data; longer output is cut into several.
	maxLogRecord = 1 << 20
	logIndexStep = 64 << 10
	// logReserve bytes of the file system, or one part in logReserveShare of it if that is less, are not for output.
	logReserve      = 1 << 30
	logReserveShare = 20
	// logSegments is into how many parts a limit is cut: one of them is what is lost at once.
	logSegments = 8
	// minLogSegment and maxLogSegment bound them: few files, and little to be read through when a daemon comes back.
	minLogSegment = 8 << 10
	maxLogSegment = 16 << 20
)

// openOutputLog opens or makes the log in a directory. A torn record at its end, as a crash leaves it, is cut off.
func openOutputLog(dir string, limit uint64) (*outputLog, error) {
	l := &outputLog{dir: dir, changed: make(chan struct{}), limit: int64(limit)}
	if err := l.recover(); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

// recover finds the segments and checks that each continues the one before.
func (l *outputLog) recover() error {
	names, err := logSegmentNames(l.dir)
	if err != nil {
		return err
	}
	next := logCursor{}
	for i, name := range names {
		s, err := openLogSegment(l.dir, name, i == len(names)-1)
		if err != nil {
			return err
		}
		if i > 0 && s.base != next {
			// What follows a damaged record cannot be placed: it is as if it had never been written.
			s.file.Close()
			return removeLogSegments(l.dir, names[i:])
		}
		l.segments = append(l.segments, s)
		next = s.end
	}
	if len(l.segments) == 0 {
		return l.addSegmentLocked(logCursor{})
	}
	return nil
}

// segmentSizeLocked is how large a segment becomes.
func (l *outputLog) segmentSizeLocked() int64 {
	return min(max(l.limit/logSegments, minLogSegment), maxLogSegment)
}

func (l *outputLog) addSegmentLocked(at logCursor) error {
	s, err := newLogSegment(l.dir, at)
	if err != nil {
		return err
	}
	l.segments = append(l.segments, s)
	fault.At("output", "made")
	return nil
}

func (l *outputLog) lastLocked() *logSegment { return l.segments[len(l.segments)-1] }

// setLimit takes effect with the next output.
func (l *outputLog) setLimit(limit uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.limit = int64(limit)
}

// bound is how much the log keeps on the disk.
func (l *outputLog) bound() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.limit
}

// errDiskReserved: what is left of the disk is for the daemon's records and everybody else's sandboxes.
var errDiskReserved = errors.New("the state directory's file system is nearly full: make room, and it goes on")

// checkReserve keeps a workload's output from taking the last of the disk.
func (l *outputLog) checkReserve() error {
	var st unix.Statfs_t
	if err := unix.Statfs(l.dir, &st); err != nil {
		return fmt.Errorf("cannot see how full the disk is: %w", err)
	}
	if free := st.Bavail * uint64(st.Bsize); free < min(logReserve, st.Blocks*uint64(st.Bsize)/logReserveShare) {
		return errDiskReserved
	}
	return nil
}

// append writes one piece of output. After an error the log is as it was before, or has the beginning of the piece.
func (l *outputLog) append(e LogEntry) error {
	if err := l.checkReserve(); err != nil {
		return err
	}
	for len(e.Data) > 0 {
		n, err := l.appendSome(e)
		if err != nil {
			return err
		}
		e.Data = e.Data[n:]
	}
	return nil
}

// appendSome writes as much of a piece as one record holds.
func (l *outputLog) appendSome(e LogEntry) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return 0, os.ErrClosed
	}
	size := l.segmentSizeLocked()
	e.Data = e.Data[:min(int64(len(e.Data)), maxLogRecord, size-logHeaderLen)]
	need := int64(logHeaderLen + len(e.Data))
	if last := l.lastLocked(); last.size > 0 && last.size+need > size {
		if err := l.addSegmentLocked(last.end); err != nil {
			return 0, err
		}
	}
	if err := l.dropLocked(need); err != nil {
		return 0, err
	}
	last := l.lastLocked()
	b := make([]byte, logHeaderLen, need)
	binary.LittleEndian.PutUint32(b[0:], uint32(len(e.Data)))
	binary.LittleEndian.PutUint64(b[8:], last.end.offset)
	binary.LittleEndian.PutUint64(b[16:], uint64(e.Time.UnixNano()))
	b[24] = byte(e.Stream)
	b = append(b, e.Data...)
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
	if _, err := last.file.WriteAt(b, last.size); err != nil {
		return 0, fmt.Errorf("cannot write output log: %w", err)
	}
	last.grew(need, len(e.Data))
	fault.At("output", "appended")
	l.wakeLocked()
	return len(e.Data), nil
}

// dropLocked removes the oldest segments until there is room for need bytes within the limit; never the last.
func (l *outputLog) dropLocked(need int64) error {
	total := need
	for _, s := range l.segments {
		total += s.size
	}
	for total > l.limit && len(l.segments) > 1 {
		oldest := l.segments[0]
		if err := os.Remove(oldest.file.Name()); err != nil {
			return fmt.Errorf("cannot remove the oldest output: %w", err)
		}
		oldest.file.Close() // whoever reads it looks again
		total -= oldest.size
		l.segments = l.segments[1:]
		fault.At("output", "oldest removed")
	}
	return nil
}

func (l *outputLog) wakeLocked() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// end is where the next record goes, and a channel that is closed when that changes.
func (l *outputLog) end() (end logCursor, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lastLocked().end, l.changed
}

// at answers with the segment in which the record at a cursor lies; the oldest if that is gone, nil at the end.
func (l *outputLog) at(c logCursor) (*logSegment, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, os.ErrClosed
	}
	for _, s := range l.segments {
		if c.pos < s.end.pos {
			return s, nil
		}
	}
	return nil, nil
}

// read calls fn with every record from a cursor on and answers where it got to. Where records are gone fn is told how much.
func (l *outputLog) read(ctx context.Context, c logCursor, fn func(LogEntry) error) (logCursor, error) {
	end, _ := l.end()
	for c.pos < end.pos {
		if err := ctx.Err(); err != nil {
			return c, err
		}
		s, err := l.at(c)
		if err != nil || s == nil {
			return c, err
		}
		if c.pos < s.base.pos {
			lost := s.base.offset - c.offset
			c = s.base
			if err := fn(LogEntry{Time: time.Now(), Dropped: lost}); err != nil {
				return c, err
			}
			continue
		}
		r, err := s.record(c.pos)
		if errors.Is(err, os.ErrClosed) {
			continue // dropped meanwhile, or the log was closed: at tells
		}
		if err != nil {
			return c, err
		}
		if err := fn(r.LogEntry); err != nil {
			return c, err
		}
		c = r.next
	}
	return c, nil
}

// tail answers where the last n lines begin: at a record, and how many bytes of its data come before them. Lines of both
// streams count together, in the order they were read. If there are fewer it is the beginning, gone or not.
func (l *outputLog) tail(n int) (c logCursor, skip int, err error) {
	l.mu.Lock()
	end := l.lastLocked().end
	segments := make([]tailPart, len(l.segments))
	for i, s := range l.segments {
		segments[i] = tailPart{s, s.end.pos, s.index}
	}
	l.mu.Unlock()
	if n == 0 {
		return end, 0, nil
	}
	count := lineCount{want: n, last: true}
	for i := len(segments) - 1; i >= 0; i-- {
		found, skip, err := segments[i].tail(&count)
		if errors.Is(err, os.ErrClosed) {
			break // dropped meanwhile, with everything before it
		}
		if err != nil {
			return logCursor{}, 0, err
		}
		if found != nil {
			return *found, skip, nil
		}
	}
	return logCursor{}, 0, nil
}

func (l *outputLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	l.wakeLocked()
	for _, s := range l.segments {
		s.file.Close()
	}
}
