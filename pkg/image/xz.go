package image

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"hash"
	"hash/crc32"
	"hash/crc64"
	"io"
	"slices"

	"github.com/ulikunitz/xz/lzma"
)

// xzReader walks the .xz container (The .xz File Format 1.2.1, tukaani.org/xz/xz-file-format.txt) and leaves LZMA2 itself
// to the xz library. The library's own container reader allocates whatever dictionary a block asks for, up to 4 GiB; here
// a block may ask for maxWindow.
type xzReader struct {
	r     *countingByteReader
	block *lzma.Reader2
	// The check that ends each block of the current stream: its size in bytes, and its hash, nil if of no known kind.
	checkSize int
	check     hash.Hash
	// Where the block's header began, for the padding after it.
	blockStart int64
	state      xzState
}

type xzState int

const (
	xzAtStream xzState = iota // a stream header, padding, or the end
	xzAtBlock                 // a block header or the index
	xzInBlock
)

var (
	xzMagic       = []byte{0xfd, '7', 'z', 'X', 'Z', 0x00}
	xzFooterMagic = []byte{'Y', 'Z'}
	errXZ         = errors.New("not what an xz file looks like")
)

const (
	xzFilterLZMA2 = 0x21
	xzHeaderLen   = 12
	xzFooterLen   = 12
)

func newXZReader(r io.Reader) *xzReader {
	return &xzReader{r: &countingByteReader{r: bufio.NewReader(r)}}
}

type countingByteReader struct {
	r *bufio.Reader
	n int64
}

func (c *countingByteReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

func (c *countingByteReader) ReadByte() (byte, error) {
	b, err := c.r.ReadByte()
	if err == nil {
		c.n++
	}
	return b, err
}

func (x *xzReader) Read(p []byte) (int, error) {
	for {
		var err error
		switch x.state {
		case xzAtStream:
			err = x.openStream() // io.EOF at the end of the file
		case xzAtBlock:
			err = midFile(x.openBlock())
		case xzInBlock:
			n, err := x.block.Read(p)
			if n > 0 {
				if x.check != nil {
					x.check.Write(p[:n])
				}
				if errors.Is(err, io.EOF) {
					err = nil // told by the next Read
				}
				return n, err
			}
			if err == nil {
				return 0, nil
			}
			if !errors.Is(err, io.EOF) {
				return 0, err
			}
			if err := midFile(x.closeBlock()); err != nil {
				return 0, err
			}
		}
		if err != nil {
			return 0, err
		}
	}
}

// midFile makes an end where none may be an error.
func midFile(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func (x *xzReader) openStream() error {
	var head [xzHeaderLen]byte
	// Between streams may stand zero bytes in fours.
	for {
		if _, err := io.ReadFull(x.r, head[:4]); err != nil {
			return err
		}
		if head[0]|head[1]|head[2]|head[3] != 0 {
			break
		}
	}
	if _, err := io.ReadFull(x.r, head[4:]); err != nil {
		return midFile(err)
	}
	flags := head[6:8]
	if !bytes.Equal(head[:6], xzMagic) || crc32.ChecksumIEEE(flags) != binary.LittleEndian.Uint32(head[8:]) {
		return errXZ
	}
	if flags[0] != 0 || flags[1] > 0x0f {
		return fmt.Errorf("%w: unknown flags %x", errXZ, flags)
	}
	x.setCheck(int(flags[1]))
	x.state = xzAtBlock
	return nil
}

// setCheck follows the table of section 2.1.1.2, where the check's id gives its size, known or not.
func (x *xzReader) setCheck(id int) {
	x.check, x.checkSize = nil, 0
	if id > 0 {
		x.checkSize = 4 << ((id - 1) / 3)
	}
	switch id {
	case 1:
		x.check = crc32.NewIEEE()
	case 4:
		x.check = crc64.New(crc64.MakeTable(crc64.ECMA))
	case 10:
		x.check = sha256.New()
	}
}

// openBlock reads a block's header, or the index that follows the last block.
func (x *xzReader) openBlock() error {
	x.blockStart = x.r.n
	size, err := x.r.ReadByte()
	if err != nil {
		return err
	}
	if size == 0 {
		return x.skipIndex()
	}
	head := make([]byte, (int(size)+1)*4)
	head[0] = size
	if _, err := io.ReadFull(x.r, head[1:]); err != nil {
		return err
	}
	fields, sum := head[1:len(head)-4], binary.LittleEndian.Uint32(head[len(head)-4:])
	if crc32.ChecksumIEEE(head[:len(head)-4]) != sum {
		return errXZ
	}
	dict, err := lzma2Dictionary(fields)
	if err != nil {
		return err
	}
	x.block, err = lzma.Reader2Config{DictCap: dict}.NewReader2(x.r)
	if err != nil {
		return err
	}
	x.state = xzInBlock
	return nil
}

// lzma2Dictionary reads the size of the dictionary from a block header's fields. LZMA2 must be the only filter: the
// others are for executables alone and nobody uses them for tars.
func lzma2Dictionary(fields []byte) (int, error) {
	flags := fields[0]
	rest := bytes.NewReader(fields[1:])
	if flags&0x3f != 0 {
		return 0, fmt.Errorf("%w: filters other than LZMA2 are not supported", errXZ)
	}
	for _, present := range []byte{0x40, 0x80} { // compressed and uncompressed size, not needed
		if flags&present != 0 {
			if _, err := binary.ReadUvarint(rest); err != nil {
				return 0, errXZ
			}
		}
	}
	id, err1 := binary.ReadUvarint(rest)
	propSize, err2 := binary.ReadUvarint(rest)
	prop, err3 := rest.ReadByte()
	if errors.Join(err1, err2, err3) != nil || propSize != 1 {
		return 0, errXZ
	}
	if id != xzFilterLZMA2 {
		return 0, fmt.Errorf("%w: filters other than LZMA2 are not supported", errXZ)
	}
	dict, err := lzma.DecodeDictCap(prop)
	if err != nil {
		return 0, err
	}
	if dict > maxWindow {
		return 0, fmt.Errorf("it asks for a dictionary of %d MiB, more than %d", dict/mib, maxWindow/mib)
	}
	return max(int(dict), lzma.MinDictCap), nil
}

// closeBlock reads what ends a block: padding to four bytes and the check.
func (x *xzReader) closeBlock() error {
	if !x.block.EOS() {
		return errXZ
	}
	x.block = nil
	x.state = xzAtBlock
	padding := (4 - (x.r.n-x.blockStart)%4) % 4
	if _, err := io.CopyN(io.Discard, x.r, padding); err != nil {
		return err
	}
	want := make([]byte, x.checkSize)
	if _, err := io.ReadFull(x.r, want); err != nil {
		return err
	}
	if x.check == nil {
		return nil
	}
	got := x.check.Sum(nil)
	x.check.Reset()
	if x.checkSize < sha256.Size {
		slices.Reverse(got) // Go's CRCs are big-endian, the format little
	}
	if !bytes.Equal(got, want) {
		return fmt.Errorf("%w: its checksum does not fit", errXZ)
	}
	return nil
}

// skipIndex reads over the index and the stream's footer.
func (x *xzReader) skipIndex() error {
	records, err := binary.ReadUvarint(x.r)
	if err != nil {
		return err
	}
	for range records { // two numbers each; the file's end ends a lie about how many
		for range 2 {
			if _, err := binary.ReadUvarint(x.r); err != nil {
				return err
			}
		}
	}
	padding := (4 - (x.r.n-x.blockStart)%4) % 4
	if _, err := io.CopyN(io.Discard, x.r, padding+crc32.Size); err != nil {
		return err
	}
	var foot [xzFooterLen]byte
	if _, err := io.ReadFull(x.r, foot[:]); err != nil {
		return err
	}
	if !bytes.Equal(foot[10:], xzFooterMagic) {
		return errXZ
	}
	x.state = xzAtStream
	return nil
}
