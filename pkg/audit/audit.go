// Package audit keeps a log of who had the daemon change what: lines of JSON, appended to a file that is rotated and
// bounded. It knows nothing of the API: pkg/server says what is in a line.
//
// What it promises: Begin answers with an error if the line of a call might find no room, so that the call can be
// refused before it changed anything. A line is with the kernel when End returns: it outlives the daemon; syncEvery later it
// is on the disk: it outlives the host. History is never dropped to make room, only at the bound the operator set.
package audit

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// MaxLineBytes bounds a line; pkg/server shortens what callers chose to stay far below.
	MaxLineBytes = 64 << 10
	// reserveBytes is by how much the file's blocks are taken ahead: a disk that fills up meanwhile takes no line away.
	reserveBytes = 512 << 10
	// syncEvery is what the host's death may take: waiting for the disk in each call would cost it milliseconds.
	syncEvery = time.Second
	// MinSizeBytes is the least a file may have: room for some lines of the greatest length.
	MinSizeBytes = 1 << 20
)

// Config says where the log is and how large it becomes.
type Config struct {
	// Only root may read it. Older files have the names Path.1 (the youngest) to Path.Keep.
	Path string
	// A file that would be larger is rotated; at least MinSizeBytes.
	SizeBytes int64
	// How many rotated files are kept: with the current one they bound the log at (Keep+1)×SizeBytes.
	Keep int
}

// Log is an audit log that is open.
type Log struct {
	config Config
	// Ends with Close.
	stop   chan struct{}
	synced sync.WaitGroup

	mu sync.Mutex // guards what follows
	// Nil after a failure: the next Begin tries again.
	file *os.File
	// What is written, and how much of the disk the file has.
	size, reserved int64
	// Calls that began and have no line yet.
	pending int64
	// Lines that could not be written since the last one that could.
	lost  uint64
	total uint64 // lost, ever
	dirty bool
}

// Open opens the log, or begins one. A line that a host's death cut off is ended, so that the next one is whole.
func Open(c Config) (*Log, error) {
	if c.SizeBytes < MinSizeBytes || c.Keep < 1 {
		return nil, fmt.Errorf("cannot open audit log: its files must have at least %d bytes, and at least one must be kept", MinSizeBytes)
	}
	if err := os.MkdirAll(filepath.Dir(c.Path), 0o700); err != nil {
		return nil, fmt.Errorf("cannot open audit log: %w", err)
	}
	l := &Log{config: c, stop: make(chan struct{})}
	if err := os.Remove(c.Path + ".new"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("cannot open audit log: %w", err)
	}
	if err := l.openLocked(); err != nil {
		return nil, err
	}
	l.synced.Go(l.syncNowAndThen)
	return l, nil
}

const openFlags = os.O_RDWR | os.O_CREATE | os.O_APPEND | unix.O_NOFOLLOW

func (l *Log) openLocked() error {
	f, err := os.OpenFile(l.config.Path, openFlags, 0o600)
	if err != nil {
		return fmt.Errorf("cannot open audit log: %w", err)
	}
	size, err := wholeLines(f)
	if err != nil {
		return errors.Join(fmt.Errorf("cannot open audit log: %w", err), f.Close())
	}
	l.file, l.size, l.reserved = f, size, size
	return nil
}

// wholeLines is the size of a file after its last line was ended.
func wholeLines(f *os.File) (int64, error) {
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil || size == 0 {
		return size, err
	}
	var last [1]byte
	if _, err := f.ReadAt(last[:], size-1); err != nil || last[0] == '\n' {
		return size, err
	}
	n, err := f.Write([]byte("\n"))
	return size + int64(n), err
}

// Begin makes room for the line of a call that is about to change something; End, or Forget, must follow. After an error
// nothing follows, and the call must not go on.
func (l *Log) Begin() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.roomLocked((l.pending + 1) * MaxLineBytes); err != nil {
		return err
	}
	l.pending++
	return nil
}

// Forget gives back what Begin took.
func (l *Log) Forget() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pending--
}

// End writes the line of a call that Begin was called for.
func (l *Log) End(line any) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.pending--
	return l.writeLocked(line)
}

// Write writes a line that nothing waits for: of a call that was refused, or of one that lasted long.
func (l *Log) Write(line any) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	// If there is no room the write itself says so.
	_ = l.roomLocked((l.pending + 1) * MaxLineBytes)
	return l.writeLocked(line)
}

// Lost is how many lines could not be written.
func (l *Log) Lost() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.total
}

func (l *Log) writeLocked(line any) (err error) {
	defer func() {
		if err != nil {
			l.lost++
			l.total++
		}
	}()
	b, err := encode(line)
	if err == nil && len(b) >= MaxLineBytes {
		err = fmt.Errorf("it has %d bytes", len(b))
	}
	if err != nil {
		return fmt.Errorf("cannot write audit line: %w", err)
	}
	if l.file == nil {
		return errors.New("cannot write audit line: the log is not open")
	}
	if l.lost > 0 {
		// Whoever reads the log must see that something is missing.
		b = append(b[:len(b)-1], ",\"lost_before\":"+strconv.FormatUint(l.lost, 10)+"}"...)
	}
	n, err := l.file.Write(append(b, '\n'))
	l.size += int64(n)
	if err != nil {
		// A piece of a line may be there: opening the file again ends it.
		err = errors.Join(fmt.Errorf("cannot write audit line: %w", err), l.file.Close())
		l.file = nil
		return err
	}
	l.lost, l.dirty = 0, true
	return nil
}

// encode is json.Marshal without the escapes for HTML, which would make six bytes of one.
func encode(line any) ([]byte, error) {
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(line); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(b.Bytes(), []byte("\n")), nil
}

// roomLocked sees to it that so many bytes can be written, whatever becomes of the disk.
func (l *Log) roomLocked(need int64) error {
	if l.file == nil {
		if err := l.openLocked(); err != nil {
			return err
		}
	}
	// Many calls at once may need more than a file has: then it is rotated later.
	need = min(need, l.config.SizeBytes)
	if l.size+need > l.config.SizeBytes && l.size > 0 && l.size+need > l.reserved {
		return l.rotateLocked(need)
	}
	return l.reserveLocked(need)
}

func (l *Log) reserveLocked(need int64) error {
	if l.size+need <= l.reserved {
		return nil
	}
	upTo := max(l.reserved+reserveBytes, l.size+need)
	if err := reserve(l.file, l.reserved, upTo); err != nil {
		return err
	}
	l.reserved = upTo
	return nil
}

// reserve takes blocks of the disk without making the file longer. Where a file system cannot, the write itself must do.
func reserve(f *os.File, from, to int64) error {
	err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_KEEP_SIZE, from, to-from)
	if err != nil && !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.ENOSYS) {
		return fmt.Errorf("cannot make room for the audit log: %w", err)
	}
	return nil
}

// rotateLocked begins a new file, with its room, before the old one loses its name: a disk that is full stops here.
func (l *Log) rotateLocked(need int64) error {
	path := l.config.Path
	next, err := os.OpenFile(path+".new", openFlags|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("cannot rotate audit log: %w", err)
	}
	room := max(reserveBytes, need)
	if err := reserve(next, 0, room); err != nil {
		return errors.Join(err, next.Close(), os.Remove(path+".new"))
	}
	// The room that was not needed is given back.
	err = errors.Join(l.file.Truncate(l.size), l.file.Sync())
	for i := l.config.Keep; i >= 1 && err == nil; i-- {
		err = renameIfThere(l.older(i-1), l.older(i))
	}
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		// The names may have moved in part: what has the log's name is opened again.
		err = errors.Join(fmt.Errorf("cannot rotate audit log: %w", err), next.Close(), l.file.Close())
		l.file = nil
		return err
	}
	old := l.file
	l.file, l.size, l.reserved = next, 0, room
	return errors.Join(old.Close(), syncDir(filepath.Dir(path)))
}

// older is the name of the i-th oldest file, 0 the current one.
func (l *Log) older(i int) string {
	if i == 0 {
		return l.config.Path
	}
	return l.config.Path + "." + strconv.Itoa(i)
}

func renameIfThere(from, to string) error {
	if err := os.Rename(from, to); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// syncNowAndThen brings lines to the disk. A disk that fails is not asked again about the same file: what it lost it would not
// tell a second time.
func (l *Log) syncNowAndThen() {
	tick := time.NewTicker(syncEvery)
	defer tick.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-tick.C:
		}
		l.syncDirty()
	}
}

func (l *Log) syncDirty() {
	l.mu.Lock()
	f := l.file
	if !l.dirty || f == nil {
		l.mu.Unlock()
		return
	}
	l.dirty = false
	l.mu.Unlock()
	// Not under the lock: calls go on meanwhile. A rotation syncs and closes the file itself.
	err := f.Sync()
	if err == nil || errors.Is(err, os.ErrClosed) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lost++
	l.total++
	if l.file == f {
		f.Close()
		l.file = nil
	}
}

// Close brings the last lines to the disk.
func (l *Log) Close() error {
	close(l.stop)
	l.synced.Wait()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return nil
	}
	f := l.file
	l.file = nil
	return errors.Join(f.Truncate(l.size), f.Sync(), f.Close())
}
