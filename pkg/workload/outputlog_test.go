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

func newTestLog(t *testing.T) (*outputLog, string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "output.log")
	l, err := openOutputLog(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.close)
	return l, path
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

func readAll(t *testing.T, l *outputLog, pos int64, skip int) string {
	t.Helper()
	var b bytes.Buffer
	if _, err := l.read(t.Context(), pos, func(e LogEntry) error {
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
	want := readAll(t, l, 0, 0)
	l.close()
	again, err := openOutputLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer again.close()
	if got := readAll(t, again, 0, 0); got != want || len(got) != 8+3*maxLogRecord+5+3 {
		t.Errorf("read %d bytes after reopening, want %d", len(got), len(want))
	}
	if _, offset, _ := again.end(); offset != uint64(len(want)) {
		t.Errorf("offset %d, want %d", offset, len(want))
	}
	r, err := again.readRecord(0)
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
		if err := os.Truncate(path, 2*(logHeaderLen+4)-int64(cut)); err != nil {
			t.Fatal(err)
		}
		again, err := openOutputLog(path)
		if err != nil {
			t.Fatal(err)
		}
		appendAll(t, again, "2nd\n")
		if got := readAll(t, again, 0, 0); got != "one\n2nd\n" {
			t.Errorf("cut by %d: read %q", cut, got)
		}
		again.close()
	}
}

func TestOutputLogCutsDamagedLastRecord(t *testing.T) {
	l, path := newTestLog(t)
	appendAll(t, l, "one\n", "two\n")
	l.close()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	again, err := openOutputLog(path)
	if err != nil {
		t.Fatal(err)
	}
	defer again.close()
	if got := readAll(t, again, 0, 0); got != "one\n" {
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
	_, _, grown := l.end()
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
