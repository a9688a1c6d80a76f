package workload

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// outputLog is a workload's output on disk: records appended in the order they were read from the agent, each with the
// count of output bytes before it. That count is what the agent is asked to go on from after a restart, so a record
// that is whole is never asked for again, and one that is torn always is.
//
// A record is a header of logHeaderLen bytes, little endian, and the data:
//
//	0  uint32  length of the data
//	4  uint32  CRC-32C of everything after it
//	8  uint64  output bytes before this record
//	16 int64   time, nanoseconds since 1970
//	24 uint8   stream; 7 zero bytes
type outputLog struct {
	file *os.File

	mu sync.Mutex // guards what follows
	// Where the next record goes, and the output bytes before it.
	size   int64
	offset uint64
	// Positions of records at least logIndexStep apart, so that the tail is found without reading everything.
	index []int64
	// Closed and replaced whenever size grows, and when the log is closed.
	changed chan struct{}
	closed  bool
}

const (
	logHeaderLen = 32
	// maxLogRecord bounds a record's data; longer output is cut into several.
	maxLogRecord = 1 << 20
	logIndexStep = 64 << 10
	// logReserve bytes of the file system, or one part in logReserveShare of it if that is less, are not for output.
	logReserve      = 1 << 30
	logReserveShare = 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// openOutputLog opens or makes the log. A torn record at the end, as a crash leaves it, is cut off.
func openOutputLog(path string) (*outputLog, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open output log: %w", err)
	}
	l := &outputLog{file: f, changed: make(chan struct{})}
	if err := l.recover(); err != nil {
		f.Close()
		return nil, err
	}
	return l, nil
}

func (l *outputLog) recover() error {
	st, err := l.file.Stat()
	if err != nil {
		return fmt.Errorf("cannot read output log: %w", err)
	}
	headers := &logHeaders{file: l.file, size: st.Size()}
	for l.size < st.Size() {
		h, err := headers.at(l.size)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		end := l.size + logHeaderLen + int64(h.length)
		if !h.sane() || h.offset != l.offset || end > st.Size() {
			break
		}
		// Only the last record can be torn by a crash, so only it has its data checked.
		if end == st.Size() {
			if _, err := l.readRecord(l.size); err != nil {
				break
			}
		}
		l.indexLocked(l.size)
		l.size, l.offset = end, l.offset+uint64(h.length)
	}
	if l.size != st.Size() {
		if err := l.file.Truncate(l.size); err != nil {
			return fmt.Errorf("cannot cut torn record off output log: %w", err)
		}
	}
	return nil
}

// logHeaders reads headers in order, many small records with one read.
type logHeaders struct {
	file  *os.File
	size  int64
	start int64 // of window
	// What was read last.
	window []byte
}

func (r *logHeaders) at(pos int64) (logHeader, error) {
	if pos < r.start || pos+logHeaderLen > r.start+int64(len(r.window)) {
		b := make([]byte, min(logIndexStep, r.size-pos))
		n, err := r.file.ReadAt(b, pos)
		if err != nil && err != io.EOF {
			return logHeader{}, fmt.Errorf("cannot read output log: %w", err)
		}
		r.start, r.window = pos, b[:n]
	}
	return parseLogHeader(r.window[min(pos-r.start, int64(len(r.window))):])
}

func (l *outputLog) indexLocked(pos int64) {
	if len(l.index) == 0 || pos-l.index[len(l.index)-1] >= logIndexStep {
		l.index = append(l.index, pos)
	}
}

type logHeader struct {
	length uint32
	crc    uint32
	offset uint64
	time   int64
	stream Stream
}

func (h logHeader) sane() bool {
	return h.length > 0 && h.length <= maxLogRecord && (h.stream == Stdout || h.stream == Stderr)
}

// parseLogHeader answers io.EOF where there is no whole header.
func parseLogHeader(b []byte) (logHeader, error) {
	if len(b) < logHeaderLen {
		return logHeader{}, io.EOF
	}
	return logHeader{
		length: binary.LittleEndian.Uint32(b[0:]),
		crc:    binary.LittleEndian.Uint32(b[4:]),
		offset: binary.LittleEndian.Uint64(b[8:]),
		time:   int64(binary.LittleEndian.Uint64(b[16:])),
		stream: Stream(b[24]),
	}, nil
}

var errTornRecord = errors.New("record of output log is damaged")

type logRecord struct {
	LogEntry
	next int64
}

func (l *outputLog) readRecord(pos int64) (logRecord, error) {
	var header [logHeaderLen]byte
	n, err := l.file.ReadAt(header[:], pos)
	if err != nil && err != io.EOF {
		return logRecord{}, fmt.Errorf("cannot read output log: %w", err)
	}
	h, err := parseLogHeader(header[:n])
	if err != nil {
		return logRecord{}, err
	}
	if !h.sane() {
		return logRecord{}, errTornRecord
	}
	b := make([]byte, logHeaderLen+int(h.length))
	if _, err := l.file.ReadAt(b, pos); err != nil {
		return logRecord{}, fmt.Errorf("cannot read output log: %w", err)
	}
	if crc32.Checksum(b[8:], castagnoli) != h.crc {
		return logRecord{}, errTornRecord
	}
	return logRecord{
		LogEntry: LogEntry{Time: time.Unix(0, h.time), Stream: h.stream, Data: b[logHeaderLen:]},
		next:     pos + int64(len(b)),
	}, nil
}

// errDiskReserved: what is left of the disk is for the daemon's records and everybody else's sandboxes.
var errDiskReserved = errors.New("the state directory's file system is nearly full: make room, and it goes on")

// checkReserve keeps a workload's output from taking the last of the disk.
func (l *outputLog) checkReserve() error {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(l.file.Fd()), &st); err != nil {
		return fmt.Errorf("cannot see how full the disk is: %w", err)
	}
	if free := st.Bavail * uint64(st.Bsize); free < min(logReserve, st.Blocks*uint64(st.Bsize)/logReserveShare) {
		return errDiskReserved
	}
	return nil
}

// append writes one piece of output. After an error the log is as it was before.
func (l *outputLog) append(e LogEntry) error {
	if err := l.checkReserve(); err != nil {
		return err
	}
	for len(e.Data) > maxLogRecord {
		head := e
		head.Data, e.Data = e.Data[:maxLogRecord], e.Data[maxLogRecord:]
		if err := l.append(head); err != nil {
			return err
		}
	}
	if len(e.Data) == 0 {
		return nil
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return os.ErrClosed
	}
	b := make([]byte, logHeaderLen, logHeaderLen+len(e.Data))
	binary.LittleEndian.PutUint32(b[0:], uint32(len(e.Data)))
	binary.LittleEndian.PutUint64(b[8:], l.offset)
	binary.LittleEndian.PutUint64(b[16:], uint64(e.Time.UnixNano()))
	b[24] = byte(e.Stream)
	b = append(b, e.Data...)
	binary.LittleEndian.PutUint32(b[4:], crc32.Checksum(b[8:], castagnoli))
	if _, err := l.file.WriteAt(b, l.size); err != nil {
		return fmt.Errorf("cannot write output log: %w", err)
	}
	l.indexLocked(l.size)
	l.size += int64(len(b))
	l.offset += uint64(len(e.Data))
	l.wakeLocked()
	return nil
}

func (l *outputLog) wakeLocked() {
	close(l.changed)
	l.changed = make(chan struct{})
}

// end is where the next record goes, how many output bytes come before it, and a channel that is closed when that changes.
func (l *outputLog) end() (pos int64, offset uint64, changed <-chan struct{}) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.size, l.offset, l.changed
}

// read calls fn with every record from pos on and answers where it got to.
func (l *outputLog) read(ctx context.Context, pos int64, fn func(LogEntry) error) (int64, error) {
	end, _, _ := l.end()
	for pos < end {
		if err := ctx.Err(); err != nil {
			return pos, err
		}
		r, err := l.readRecord(pos)
		if err != nil {
			return pos, err
		}
		if err := fn(r.LogEntry); err != nil {
			return pos, err
		}
		pos = r.next
	}
	return pos, nil
}

// tail answers where the last n lines begin: a record's position, and how many bytes of its data come before them.
// Lines of both streams count together, in the order they were read.
func (l *outputLog) tail(n int) (pos int64, skip int, err error) {
	l.mu.Lock()
	end, index := l.size, l.index
	l.mu.Unlock()
	if n == 0 {
		return end, 0, nil
	}
	lines, last := 0, true
	for i := len(index) - 1; i >= 0; i-- {
		var records []int64
		var data [][]byte
		for p := index[i]; p < end; {
			r, err := l.readRecord(p)
			if err != nil {
				return 0, 0, err
			}
			records, data = append(records, p), append(data, r.Data)
			p = r.next
		}
		for j := len(records) - 1; j >= 0; j-- {
			for k := len(data[j]) - 1; k >= 0; k-- {
				if data[j][k] != '\n' {
					last = false
					continue
				}
				// The newline that ends the very last line begins no further one.
				if last {
					last = false
					continue
				}
				if lines++; lines == n {
					return records[j], k + 1, nil
				}
			}
		}
		end = index[i]
	}
	return 0, 0, nil
}

func (l *outputLog) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return
	}
	l.closed = true
	l.wakeLocked()
	l.file.Close()
}
