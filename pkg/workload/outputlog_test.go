package workload

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// testLogLimit is more than the tests write that want all of it back.
const testLogLimit = 128 << 20

// lastSegment is the path of the segment that is written to.
func lastSegment(t *testing.T, dir string) string {
	t.Helper()
	names, err := logSegmentNames(dir)
	if err != nil || len(names) == 0 {
		t.Fatalf("segments %v, %v", names, err)
	}
	return filepath.Join(dir, names[len(names)-1])
}

func newTestLog(t *testing.T) (*outputLog, string) {
	t.Helper()
	dir := t.TempDir()
	l, err := openOutputLog(dir, testLogLimit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.close)
	return l, dir
}

func appendAll(t *testing.T, l *outputLog, pieces ...string) {
	t.Helper()
	for i, p := range pieces {
		stream := Stdout
		if i%2 == 1 {
			stream = Stderr
		}
		if err := l.append(LogEntry{Time: time.Unix(int64(i), 0), Stream: stream, Data: []byte(p)}); err != nil {
			t.Fatal(err)
		}
	}
}

func readAll(t *testing.T, l *outputLog, at logCursor, skip int) string {
	t.Helper()
	var b bytes.Buffer
	if _, err := l.read(t.Context(), at, func(e LogEntry) error {
		b.Write(e.Data[skip:])
		skip = 0
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestOutputLogComesBackWhole(t *testing.T) {
	l, path := newTestLog(t)
	appendAll(t, l, "one\n", "two\n", strings.Repeat("x", 3*maxLogRecord+5), "end")
	want := readAll(t, l, logCursor{}, 0)
	l.close()
	again, err := openOutputLog(path, testLogLimit)
	if err != nil {
		t.Fatal(err)
	}
	defer again.close()
	if got := readAll(t, again, logCursor{}, 0); got != want || len(got) != 8+3*maxLogRecord+5+3 {
		t.Errorf("read %d bytes after reopening, want %d", len(got), len(want))
	}
	if end, _ := again.end(); end.offset != uint64(len(want)) {
		t.Errorf("offset %d, want %d", end.offset, len(want))
	}
	r, err := again.segments[0].record(0)
	if err != nil || r.Stream != Stdout || !r.Time.Equal(time.Unix(0, 0)) {
		t.Errorf("first record is %v %v, %v", r.Stream, r.Time, err)
	}
}

// A crash may cut a write anywhere; what was whole before it must stay, and nothing of the torn record may show.
func TestOutputLogCutsTornRecord(t *testing.T) {
	for cut := 1; cut < logHeaderLen+4; cut++ {
		l, path := newTestLog(t)
		appendAll(t, l, "one\n", "two\n")
		l.close()
		if err := os.Truncate(lastSegment(t, path), 2*(logHeaderLen+4)-int64(cut)); err != nil {
			t.Fatal(err)
		}
		again, err := openOutputLog(path, testLogLimit)
		if err != nil {
			t.Fatal(err)
		}
		appendAll(t, again, "2nd\n")
		if got := readAll(t, again, logCursor{}, 0); got != "one\n2nd\n" {
			t.Errorf("cut by %d: read %q", cut, got)
		}
		again.close()
	}
}

func TestOutputLogCutsDamagedLastRecord(t *testing.T) {
	l, path := newTestLog(t)
	appendAll(t, l, "one\n", "two\n")
	l.close()
	b, err := os.ReadFile(lastSegment(t, path))
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(lastSegment(t, path), b, 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := openOutputLog(path, testLogLimit)
	if err != nil {
		t.Fatal(err)
	}
	defer again.close()
	if got := readAll(t, again, logCursor{}, 0); got != "one\n" {
		t.Errorf("read %q", got)
	}
}

func TestOutputLogTail(t *testing.T) {
	tests := []struct {
		pieces []string
		n      int
		want   string
	}{
		{[]string{"a\nb\nc\n"}, 2, "b\nc\n"},
		{[]string{"a\nb\nc"}, 2, "b\nc"},
		{[]string{"a\nb", "b\n", "c\n"}, 2, "bb\nc\n"},
		{[]string{"a\n", "b\n"}, 5, "a\nb\n"},
		{[]string{"a\n", "b\n"}, 0, ""},
		{[]string{"\n", "\n", "\n"}, 2, "\n\n"},
		{[]string{"a\n", strings.Repeat("y", 3*logIndexStep), "\nz\n"}, 1, "z\n"},
		{[]string{"a\nb\n", strings.Repeat("y", 3*logIndexStep), "\nz\n"}, 3, "b\n" + strings.Repeat("y", 3*logIndexStep) + "\nz\n"},
		{nil, 3, ""},
	}
	for i, tt := range tests {
		l, _ := newTestLog(t)
		appendAll(t, l, tt.pieces...)
		pos, skip, err := l.tail(tt.n)
		if err != nil {
			t.Fatal(err)
		}
		if got := readAll(t, l, pos, skip); got != tt.want {
			t.Errorf("%d: tail %d of %.40q is %.40q, want %.40q", i, tt.n, tt.pieces, got, tt.want)
		}
	}
}

func TestOutputLogTailOfManyRecords(t *testing.T) {
	l, _ := newTestLog(t)
	for i := range 20000 {
		if err := l.append(LogEntry{Time: time.Now(), Stream: Stdout, Data: fmt.Appendf(nil, "%d\n", i)}); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []int{1, 100, 5000, 19999, 20000, 30000} {
		pos, skip, err := l.tail(n)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(strings.TrimSuffix(readAll(t, l, pos, skip), "\n"), "\n")
		if len(lines) != min(n, 20000) || lines[len(lines)-1] != "19999" {
			t.Errorf("tail %d gives %d lines, last %q", n, len(lines), lines[len(lines)-1])
		}
	}
}

func TestOutputLogWakesReaders(t *testing.T) {
	l, _ := newTestLog(t)
	_, grown := l.end()
	if err := l.append(LogEntry{Time: time.Now(), Stream: Stdout, Data: []byte("x")}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	select {
	case <-grown:
	case <-ctx.Done():
		t.Fatal("a reader was not woken")
	}
}

// onDisk is how much the log's files hold.
func onDisk(t *testing.T, dir string) (total int64) {
	t.Helper()
	names, err := logSegmentNames(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		total += st.Size()
	}
	return total
}

// A flood: never more on the disk than the limit, the newest is kept, and what is gone is said to the byte.
func TestOutputLogIsBounded(t *testing.T) {
	const limit = 256 << 10
	dir := t.TempDir()
	l, err := openOutputLog(dir, limit)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { l.close() }()
	written := 0
	for i := range 40000 {
		line := fmt.Appendf(nil, "line %d\n", i)
		if i%1000 == 999 { // larger than a segment
			line = append(bytes.Repeat([]byte("x"), 100_000), '\n')
		}
		if err := l.append(LogEntry{Time: time.Now(), Stream: Stdout, Data: line}); err != nil {
			t.Fatal(err)
		}
		written += len(line)
		if i%500 == 0 {
			if n := onDisk(t, dir); n > limit {
				t.Fatalf("%d bytes on the disk after %d lines, the limit is %d", n, i, limit)
			}
		}
		if i%9000 == 8999 { // a daemon's restart
			l.close()
			if l, err = openOutputLog(dir, limit); err != nil {
				t.Fatal(err)
			}
			if end, _ := l.end(); end.offset != uint64(written) {
				t.Fatalf("opened again, the log counts %d bytes, %d were written", end.offset, written)
			}
		}
	}
	dropped, kept, losses := uint64(0), 0, 0
	last := LogEntry{}
	if _, err := l.read(t.Context(), logCursor{}, func(e LogEntry) error {
		if e.Dropped > 0 {
			dropped += e.Dropped
			losses++
		}
		kept += len(e.Data)
		last = e
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if losses != 1 || dropped+uint64(kept) != uint64(written) || kept < limit/4 || last.Data[len(last.Data)-1] != '\n' {
		t.Errorf("%d bytes dropped in %d places and %d kept of %d", dropped, losses, kept, written)
	}
	// A tail that is there is whole; one that is longer than what is there says so.
	at, skip, err := l.tail(1)
	if err != nil || len(readAll(t, l, at, skip)) != 100_001 {
		t.Errorf("the last line has %d bytes, %v", len(readAll(t, l, at, skip)), err)
	}
	if at, _, err = l.tail(39000); err != nil || at != (logCursor{}) {
		t.Errorf("a tail of more lines than are left begins at %v, %v", at, err)
	}
}

// A reader that is overtaken goes on with what is there, and is told.
func TestOutputLogOvertakesReader(t *testing.T) {
	l, err := openOutputLog(t.TempDir(), 64<<10)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	appendAll(t, l, "first")
	read, dropped, written := uint64(0), uint64(0), uint64(5)
	first := true
	at, err := l.read(t.Context(), logCursor{}, func(e LogEntry) error {
		read, dropped = read+uint64(len(e.Data)), dropped+e.Dropped
		for first && written < 1<<20 {
			appendAll(t, l, strings.Repeat("y", 1000))
			written += 1000
		}
		first = false
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if _, err = l.read(t.Context(), at, func(e LogEntry) error {
		read, dropped = read+uint64(len(e.Data)), dropped+e.Dropped
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if dropped == 0 || read+dropped != written {
		t.Errorf("read %d, told of %d that are gone, %d were written", read, dropped, written)
	}
}

// The limit is lowered while it runs: what is too much goes with the next output.
func TestOutputLogLimitChanges(t *testing.T) {
	l, dir := newTestLog(t)
	for range 300 {
		appendAll(t, l, strings.Repeat("z", 10_000))
	}
	l.setLimit(1 << 20)
	// Segments are as large as they were made: the last one of before may be larger than the new limit, until it goes.
	for range 300 {
		appendAll(t, l, strings.Repeat("z", 10_000))
	}
	if n := onDisk(t, dir); n > 1<<20 {
		t.Errorf("%d bytes on the disk", n)
	}
}
