package microvm

import (
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"github.com/ulikunitz/xz"
)

// compressions are those that kernels and their modules come in. The kernel's build appends the unpacked size, four
// bytes, to every payload but gzip's, which ends with it anyway: readers must stop at the end of their stream.
var compressions = []struct {
	name   string
	magic  string
	reader func(b []byte) (io.Reader, error)
	// The payload of a bzImage has the unpacked size after the stream, and the reader would take it for more of it.
	cutSize bool
}{
	{name: "gzip", magic: "\x1f\x8b", reader: func(b []byte) (io.Reader, error) {
		r, err := gzip.NewReader(bytes.NewReader(b))
		if err == nil {
			r.Multistream(false)
		}
		return r, err
	}},
	{name: "xz", magic: "\xfd7zXZ\x00", cutSize: true, reader: newXZReader},
	{name: "zstd", magic: "\x28\xb5\x2f\xfd", cutSize: true, reader: func(b []byte) (io.Reader, error) {
		// Kernels are packed with windows of up to 128 MiB.
		d, err := zstd.NewReader(bytes.NewReader(b), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxKernelELF), zstd.WithDecoderMaxWindow(128<<20))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}},
	{name: "lz4", magic: "\x02\x21\x4c\x18", cutSize: true, reader: func(b []byte) (io.Reader, error) {
		return lz4.NewReader(bytes.NewReader(b)), nil
	}},
}

// decompress unpacks the payload of a bzImage to at most limit bytes.
func decompress(payload []byte, limit int64) ([]byte, error) {
	return unpack(payload, limit, true)
}

// decompressFile unpacks a whole file, as a module is packed, to at most limit bytes.
func decompressFile(b []byte, limit int64) ([]byte, error) {
	return unpack(b, limit, false)
}

func unpack(b []byte, limit int64, isPayload bool) ([]byte, error) {
	for _, c := range compressions {
		if !bytes.HasPrefix(b, []byte(c.magic)) {
			continue
		}
		if isPayload && c.cutSize {
			b = b[:len(b)-4]
		}
		r, err := c.reader(b)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.name, err)
		}
		out, err := readBounded(r, limit)
		if closer, ok := r.(io.Closer); ok {
			_ = closer.Close() // frees the decoder; the bytes are read or the read has failed
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", c.name, err)
		}
		return out, nil
	}
	return nil, fmt.Errorf("unknown compression (first bytes % x); gzip, xz, zstd and lz4 are known", b[:min(len(b), 6)])
}

var errTooLarge = errors.New("too large")

// readBounded reads all of r, or fails once there is more than limit.
func readBounded(r io.Reader, limit int64) ([]byte, error) {
	out, err := io.ReadAll(io.LimitReader(r, limit+1))
	if err != nil {
		return nil, err
	}
	if int64(len(out)) > limit {
		return nil, fmt.Errorf("%w: more than %d bytes", errTooLarge, limit)
	}
	return out, nil
}

// newXZReader reads an xz file. Kernels are packed with the x86 filter, which the xz library does not know, and as a
// single block: those go to xzX86.
func newXZReader(b []byte) (io.Reader, error) {
	if hasX86Filter(b) {
		return newXZX86Reader(b)
	}
	return xz.ReaderConfig{SingleStream: true}.NewReader(bytes.NewReader(b))
}
