// Package console keeps what a sandbox's kernel and its virtual machine monitor say, as text with the time before each
// line. Whoever says it may be hostile: what is kept is bounded, and holds nothing that a terminal would obey.
package console

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// maxFile is how large a log grows before it is put aside for a new one. The one put aside before is forgotten, so a
	// workload keeps the last maxFile bytes, and at most twice as many.
	maxFile = 128 << 10
	// maxLine bounds a line, in bytes as they came. Longer ones are cut in two.
	maxLine = 1 << 10
	// maxStored bounds a line as it is stored: four bytes for each that is escaped, the time and the source's name.
	maxStored = 4*maxLine + 64
	// maxQuote bounds each of the two ends of what a source said that are kept for a message.
	maxQuote = 300

	previous = ".1"
)

// Log is where sources write to. Its methods may be called at once.
type Log struct {
	path string

	mu   sync.Mutex
	file *os.File // guarded by mu; nil where nothing is kept
	size int64    // guarded by mu
}

// Open opens the log at path, which it makes, mode 0600, if there is none. An empty path keeps nothing but what sources
// can quote.
func Open(path string) (*Log, error) {
	l := &Log{path: path}
	if path == "" {
		return l, nil
	}
	return l, l.openLocked()
}

// Keep has what is said from now on kept at path, in a log that kept nothing so far; for an empty path it goes on like that.
func (l *Log) Keep(path string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if path == "" {
		return nil
	}
	if l.file != nil || l.path != "" {
		return fmt.Errorf("cannot keep the console's log at %s: it is kept elsewhere", path)
	}
	l.path = path
	return l.openLocked()
}

func (l *Log) openLocked() error {
	f, err := os.OpenFile(l.path, os.O_WRONLY|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return fmt.Errorf("cannot open the console's log: %w", err)
	}
	info, err := f.Stat()
	if err != nil {
		return errors.Join(fmt.Errorf("cannot open the console's log: %w", err), f.Close())
	}
	l.file, l.size = f, info.Size()
	return nil
}

// Close ends the log; what is said from then on is dropped.
func (l *Log) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	err := l.file.Close()
	l.file = nil
	return err
}

// write appends a line.
func (l *Log) write(line string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	if l.size >= maxFile {
		if err := l.turnLocked(); err != nil {
			return err
		}
	}
	n, err := l.file.WriteString(line)
	l.size += int64(n)
	if err != nil {
		return fmt.Errorf("cannot write the console's log: %w", err)
	}
	return nil
}

// turnLocked begins a new file.
func (l *Log) turnLocked() error {
	if err := os.Rename(l.path, l.path+previous); err != nil {
		return fmt.Errorf("cannot put the console's log aside: %w", err)
	}
	err := l.file.Close()
	l.file = nil
	return errors.Join(err, l.openLocked())
}

// Entry is one line of a log, without its end.
type Entry struct {
	Time time.Time
	Text string
}

// Read calls fn with each line of the log at path, oldest first. A log that was never written has none.
func Read(path string, fn func(Entry) error) error {
	for _, name := range []string{path + previous, path} {
		if err := readFile(name, fn); err != nil {
			return err
		}
	}
	return nil
}

func readFile(path string, fn func(Entry) error) error {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot read the console's log: %w", err)
	}
	defer f.Close() //nolint:errcheck // only read
	lines := bufio.NewScanner(f)
	lines.Buffer(nil, 4*maxStored) // a crash may have torn one, and the next follows on it
	for lines.Scan() {
		stamp, text, _ := strings.Cut(lines.Text(), " ")
		at, err := time.Parse(time.RFC3339Nano, stamp)
		if err != nil {
			continue // torn by a crash
		}
		if err := fn(Entry{at, text}); err != nil {
			return err
		}
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("cannot read the console's log: %w", err)
	}
	return nil
}
