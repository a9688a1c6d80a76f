package image

import (
	"bufio"
	"bytes"
	"io"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// compressions are the ones known, by their first bytes. Content decides, never a name or a media type.
var compressions = []struct {
	name  string
	magic []byte
	open  func(io.Reader) (io.ReadCloser, error)
}{
	{"gzip", []byte{0x1f, 0x8b, 0x08}, func(r io.Reader) (io.ReadCloser, error) { return gzip.NewReader(r) }},
	{"zstd", []byte{0x28, 0xb5, 0x2f, 0xfd}, openZstd},
	{"xz", []byte{0xfd, '7', 'z', 'X', 'Z', 0x00}, openXZ},
}

// maxWindow is how much of its past output a decompressor may be made to keep, in bytes. zstd --long and xz -9 stay within
// it; their formats would let an archive ask for gigabytes.
const maxWindow = 128 * mib

func openZstd(r io.Reader) (io.ReadCloser, error) {
	d, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
	if err != nil {
		return nil, err
	}
	return d.IOReadCloser(), nil
}

func openXZ(r io.Reader) (io.ReadCloser, error) {
	return io.NopCloser(newXZReader(r)), nil
}

// decompressor reads what r holds after decompression, within the budget.
type decompressor struct {
	b         *budget
	src       *sourceReader
	out       io.Reader
	close     func() error
	name      string // empty if the source is not compressed
	delivered int64
}

// sourceReader counts, and keeps the source's own failure apart from what a decompressor makes of it.
type sourceReader struct {
	r    io.Reader
	read int64
	err  error
}

func (s *sourceReader) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.read += int64(n)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// decompress looks at the first bytes of r and undoes the compression they tell of.
func decompress(r io.Reader, b *budget) (*decompressor, error) {
	d := &decompressor{b: b, src: &sourceReader{r: r}, close: func() error { return nil }}
	buf := bufio.NewReaderSize(d.src, copyBuffer)
	d.out = buf
	for _, c := range compressions {
		head, err := buf.Peek(len(c.magic))
		if err != nil && err != io.EOF {
			return nil, err
		}
		if !bytes.Equal(head, c.magic) {
			continue
		}
		opened, err := c.open(buf)
		if err != nil {
			return nil, d.fault(c.name, err)
		}
		d.name, d.out, d.close = c.name, opened, opened.Close
		break
	}
	return d, nil
}

func (d *decompressor) Read(p []byte) (int, error) {
	n, err := d.out.Read(p)
	if n > 0 {
		d.delivered += int64(n)
		if err := d.b.expand(n); err != nil {
			return 0, err
		}
		if d.name != "" && d.delivered > d.b.expandFloor+d.b.expandFactor*d.src.read {
			return 0, d.b.bomb()
		}
	}
	if err != nil && err != io.EOF {
		err = d.fault(d.name, err)
	}
	return n, err
}

// fault says whose an error is: the source's, or that of the bytes it gave.
func (d *decompressor) fault(name string, err error) error {
	if d.src.err != nil {
		return d.src.err
	}
	if name == "" || isTyped(err) {
		return err
	}
	return invalidf("its %s compression is damaged: %w", name, err)
}

func (d *decompressor) Close() error { return d.close() }
