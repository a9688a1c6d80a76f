package workload

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// logSegment is one file of an outputLog. Its fields are guarded by the log's mutex; the file is read without.
type logSegment struct {
	file *os.File
	// Where its first record is, and where the next one goes.
	base, end logCursor
	size      int64
	// Positions of records at least logIndexStep apart, so that the tail is found without reading everything.
	index []int64
}

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// logSegmentPattern and logSegmentFormat name segments by where they begin, the position first: names sort as positions do.
// Both numbers are there because a segment may still be empty when all before it are gone.
const (
	logSegmentPattern = "output-*-*.log"
	logSegmentFormat  = "output-%020d-%020d.log"
)

func logSegmentNames(dir string) ([]string, error) {
	paths, err := filepath.Glob(filepath.Join(dir, logSegmentPattern))
	if err != nil {
		return nil, fmt.Errorf("cannot look for output logs: %w", err)
	}
	slices.Sort(paths)
	var names []string
	for _, p := range paths {
		names = append(names, filepath.Base(p))
	}
	return names, nil
}

func removeLogSegments(dir string, names []string) error {
	for _, name := range names {
		if err := os.Remove(filepath.Join(dir, name)); err != nil {
			return fmt.Errorf("cannot remove a damaged output log: %w", err)
		}
	}
	return nil
}

func newLogSegment(dir string, at logCursor) (*logSegment, error) {
	f, err := os.OpenFile(filepath.Join(dir, fmt.Sprintf(logSegmentFormat, at.pos, at.offset)), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot make an output log: %w", err)
	}
	return &logSegment{file: f, base: at, end: at}, nil
}

// openLogSegment reads a segment's headers up to its end, or to the first record that is none; what comes after that is
// cut off. Only the last record of the last segment can be torn by a crash, so only it has its data checked.
func openLogSegment(dir, name string, last bool) (*logSegment, error) {
	var at logCursor
	if _, err := fmt.Sscanf(name, logSegmentFormat, &at.pos, &at.offset); err != nil {
		return nil, fmt.Errorf("cannot use %s as output log: its name does not say where it begins: %w", filepath.Join(dir, name), err)
	}
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot open output log: %w", err)
	}
	s := &logSegment{file: f, base: at, end: at}
	if err := s.scan(last); err != nil {
		f.Close()
		return nil, err
	}
	return s, nil
}

func (s *logSegment) scan(last bool) error {
	st, err := s.file.Stat()
	if err != nil {
		return fmt.Errorf("cannot read output log: %w", err)
	}
	headers := &logHeaders{file: s.file, size: st.Size()}
	for s.size < st.Size() {
		h, err := headers.at(s.size)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		end := s.size + logHeaderLen + int64(h.length)
		if !h.sane() || h.offset != s.end.offset || end > st.Size() {
			break
		}
		if last && end == st.Size() {
			if _, err := s.record(s.base.pos + s.size); err != nil {
				break
			}
		}
		s.grew(logHeaderLen+int64(h.length), int(h.length))
	}
	if s.size != st.Size() {
		if err := s.file.Truncate(s.size); err != nil {
			return fmt.Errorf("cannot cut torn record off output log: %w", err)
		}
	}
	return nil
}

// grew notes a record of so many bytes, of which data are output.
func (s *logSegment) grew(bytes int64, data int) {
	if pos := s.end.pos; len(s.index) == 0 || pos-s.index[len(s.index)-1] >= logIndexStep {
		s.index = append(s.index, pos)
	}
	s.size += bytes
	s.end.pos += bytes
	s.end.offset += uint64(data)
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
	next logCursor
}

// record reads the record at a position of the log. os.ErrClosed: the segment was dropped, or the log closed.
func (s *logSegment) record(pos int64) (logRecord, error) {
	at := pos - s.base.pos
	var header [logHeaderLen]byte
	n, err := s.file.ReadAt(header[:], at)
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
	if _, err := s.file.ReadAt(b, at); err != nil {
		return logRecord{}, fmt.Errorf("cannot read output log: %w", err)
	}
	if crc32.Checksum(b[8:], castagnoli) != h.crc {
		return logRecord{}, errTornRecord
	}
	return logRecord{
		LogEntry: LogEntry{Time: time.Unix(0, h.time), Stream: h.stream, Data: b[logHeaderLen:]},
		next:     logCursor{pos: pos + int64(len(b)), offset: h.offset + uint64(h.length)},
	}, nil
}

// tailPart is a segment as a reader of the tail saw it.
type tailPart struct {
	*logSegment
	stop  int64
	index []int64
}

// lineCount counts line ends from the end on.
type lineCount struct {
	want, lines int
	// Nothing was seen yet: the newline that ends the very last line begins no further one.
	last bool
}

// back counts in data and answers with the place after the newline that makes the count full, -1 if it is not.
func (c *lineCount) back(data []byte) int {
	for k := len(data) - 1; k >= 0; k-- {
		if data[k] != '\n' {
			c.last = false
			continue
		}
		if c.last {
			c.last = false
			continue
		}
		if c.lines++; c.lines == c.want {
			return k + 1
		}
	}
	return -1
}

// tail goes back through the segment until the count is full; nil if it does not become so.
func (p tailPart) tail(count *lineCount) (*logCursor, int, error) {
	stop := p.stop
	for i := len(p.index) - 1; i >= 0; i-- {
		var records []logCursor
		var data [][]byte
		for pos := p.index[i]; pos < stop; {
			r, err := p.record(pos)
			if err != nil {
				return nil, 0, err
			}
			records = append(records, logCursor{pos: pos, offset: r.next.offset - uint64(len(r.Data))})
			data = append(data, r.Data)
			pos = r.next.pos
		}
		for j := len(records) - 1; j >= 0; j-- {
			if k := count.back(data[j]); k >= 0 {
				return &records[j], k, nil
			}
		}
		stop = p.index[i]
	}
	return nil, 0, nil
}
