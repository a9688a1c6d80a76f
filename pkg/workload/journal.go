package workload

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/fault"
)

// journal is a file of payloads, appended one after another. It begins with journalMagic; each payload has a header of
// journalHeader bytes, little endian: its length, and the CRC-32C of the length and the payload. A length of 0 is the end.
//
// The file is filled with zeros ahead of what is written, journalAhead bytes at a time: so a payload changes data only, and
// waiting for the disk is one write to it and no change of the file's size.
type journal struct {
	file *os.File
	// Where the next payload goes, and how far the file is filled.
	size, filled int64
	// Where the first payload that is damaged begins, one that whole ones follow; 0 if none is.
	damaged int64
}

// place is where a payload is, its header counted.
type place struct{ at, length int64 }

const (
	journalMagic  = "sandboxd workloads 2\n"
	journalHeader = 8
	journalAhead  = 256 << 10
	// maxPayload bounds what a damaged length is believed to be: records are a few kilobytes.
	maxPayload = 16 << 20
)

// openJournal opens or makes a journal, and calls each for every payload. What follows the last whole one is what a daemon,
// or a host, left when it died while writing: it was never acted upon, and is cut off. What is damaged before a whole one is
// skipped, and nothing is cut off: the caller keeps a copy, and writes the journal anew.
func openJournal(path string, each func(place, []byte) error) (_ *journal, err error) {
	if _, err := os.Lstat(path); errors.Is(err, os.ErrNotExist) {
		j, err := newJournal(path)
		if err != nil {
			return nil, err
		}
		err = j.name(path)
		if err == nil {
			err = syncDir(filepath.Dir(path))
		}
		if err != nil {
			return nil, errors.Join(err, j.close())
		}
		return j, nil
	}
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot open records: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("cannot read %s: %w", path, err), f.Close())
		}
	}()
	magic := make([]byte, len(journalMagic))
	if _, err := io.ReadFull(f, magic); err != nil {
		return nil, err
	}
	if string(magic) != journalMagic {
		return nil, fmt.Errorf("it begins with %q, and this sandboxd knows %q: use the sandboxd that wrote it", magic, journalMagic)
	}
	j := &journal{file: f, size: int64(len(journalMagic))}
	for {
		payload, err := j.next()
		if err != nil {
			return nil, err
		}
		if payload == nil {
			further, err := j.further()
			if err != nil {
				return nil, err
			}
			if further > 0 {
				j.damaged = cmp.Or(j.damaged, j.size)
				j.size = further
				continue
			}
			if j.damaged > 0 {
				return j, nil
			}
			return j, j.cut()
		}
		at := place{j.size, journalHeader + int64(len(payload))}
		if err := each(at, payload); err != nil {
			return nil, err
		}
		j.size += at.length
	}
}

// next reads the payload at size; nil if there is no whole one.
func (j *journal) next() ([]byte, error) {
	var h [journalHeader]byte
	if _, err := j.file.ReadAt(h[:], j.size); err != nil {
		return nil, notEOF(err)
	}
	n := int64(binary.LittleEndian.Uint32(h[:]))
	if n == 0 || n > maxPayload {
		return nil, nil
	}
	payload := make([]byte, n)
	if _, err := j.file.ReadAt(payload, j.size+journalHeader); err != nil {
		return nil, notEOF(err)
	}
	if binary.LittleEndian.Uint32(h[4:]) != sum(h[:4], payload) {
		return nil, nil
	}
	return payload, nil
}

// further is where the next whole payload begins after one that is not; 0 if there is none.
func (j *journal) further() (int64, error) {
	end, err := j.file.Seek(0, io.SeekEnd)
	if err != nil {
		return 0, err
	}
	rest, err := io.ReadAll(io.NewSectionReader(j.file, j.size, end-j.size))
	if err != nil {
		return 0, err
	}
	// Each is an object of JSON: few places look like the beginning of one.
	for i := journalHeader + 1; i < len(rest); i++ {
		next := bytes.IndexByte(rest[i:], '{')
		if next < 0 {
			break
		}
		i += next
		h, n := rest[i-journalHeader:i], int64(binary.LittleEndian.Uint32(rest[i-journalHeader:]))
		if n == 0 || n > maxPayload || int64(i)+n > int64(len(rest)) || rest[int64(i)+n-1] != '}' {
			continue
		}
		if binary.LittleEndian.Uint32(h[4:]) == sum(h[:4], rest[i:int64(i)+n]) {
			return j.size + int64(i) - journalHeader, nil
		}
	}
	return 0, nil
}

func notEOF(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

func sum(length, payload []byte) uint32 {
	return crc32.Update(crc32.Checksum(length, castagnoli), castagnoli, payload)
}

// cut drops everything after size, and fills up again: remains of a payload must not be taken for one when a shorter one is
// written over them.
func (j *journal) cut() error {
	if err := j.file.Truncate(j.size); err != nil {
		return err
	}
	j.filled = j.size
	return j.fill(journalAhead)
}

// fill makes room for n more bytes.
func (j *journal) fill(n int64) error {
	for j.filled < j.size+n {
		if _, err := j.file.WriteAt(make([]byte, journalAhead), j.filled); err != nil {
			return err
		}
		j.filled += journalAhead
	}
	return nil
}

// append writes a payload. After an error the journal is as it was. The end of what counts is always followed by a header of
// zeros.
func (j *journal) append(payload []byte) (place, error) {
	b := make([]byte, journalHeader, journalHeader+len(payload))
	b = append(b, payload...)
	binary.LittleEndian.PutUint32(b, uint32(len(payload)))
	binary.LittleEndian.PutUint32(b[4:], sum(b[:4], payload))
	if err := j.fill(int64(len(b)) + journalHeader); err != nil {
		return place{}, err
	}
	if _, err := j.file.WriteAt(b, j.size); err != nil {
		return place{}, errors.Join(err, j.cut())
	}
	at := place{j.size, int64(len(b))}
	j.size += at.length
	return at, nil
}

func (j *journal) read(at place) ([]byte, error) {
	b := make([]byte, at.length-journalHeader)
	_, err := j.file.ReadAt(b, at.at+journalHeader)
	return b, err
}

func (j *journal) sync() error { return unix.Fdatasync(int(j.file.Fd())) }

func (j *journal) close() error { return j.file.Close() }

// newJournal makes an empty journal that has not its name yet.
func newJournal(path string) (*journal, error) {
	f, err := os.OpenFile(path+".tmp", os.O_RDWR|os.O_CREATE|os.O_TRUNC|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("cannot make records: %w", err)
	}
	j := &journal{file: f}
	_, err = f.WriteAt([]byte(journalMagic), 0)
	j.size, j.filled = int64(len(journalMagic)), int64(len(journalMagic))
	if err == nil {
		err = j.fill(journalAhead)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("cannot make records: %w", err), f.Close(), os.Remove(f.Name()))
	}
	return j, nil
}

// name syncs a new journal and gives it its name, in place of the one that has it; syncDir makes that last.
func (j *journal) name(path string) error {
	if err := j.file.Sync(); err != nil {
		return fmt.Errorf("cannot make records: %w", err)
	}
	if err := os.Rename(path+".tmp", path); err != nil {
		return fmt.Errorf("cannot make records: %w", err)
	}
	return nil
}

func syncDir(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("cannot make records: %w", err)
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// rewrite makes a journal of those payloads alone, on the disk in place of this one, which it closes. If it answers with one
// and an error, the new one has the name.
func (j *journal) rewrite(path string, live map[string]places) (*journal, map[string]places, error) {
	next, err := newJournal(path)
	if err != nil {
		return nil, nil, err
	}
	copied := func(at place) (place, error) {
		payload, err := j.read(at)
		if err != nil {
			return place{}, err
		}
		return next.append(payload)
	}
	moved := make(map[string]places, len(live))
	for id, at := range live {
		var to places
		var err error
		if at.config.length > 0 { // first: the record that came with it may be older
			to.config, err = copied(at.config)
		}
		if to.record = to.config; err == nil && at.record != at.config {
			to.record, err = copied(at.record)
		}
		if err != nil { // for lack of room, perhaps: take none
			return nil, nil, errors.Join(err, next.close(), os.Remove(next.file.Name()))
		}
		moved[id] = to
	}
	fault.At("journal", "written anew")
	if err := next.name(path); err != nil {
		return nil, nil, errors.Join(err, next.close(), os.Remove(next.file.Name()))
	}
	fault.At("journal", "named")
	return next, moved, errors.Join(syncDir(filepath.Dir(path)), j.close())
}
