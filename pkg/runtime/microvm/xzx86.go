package microvm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"github.com/ulikunitz/xz/lzma"
)

// The kernel's build packs x86 kernels as xz with the x86 branch filter in front of LZMA2, one block, CRC32 or no
// check (scripts/xz_wrap.sh). Debian's ordinary kernel is one of those. Format: "The .xz File Format", version 1.2.

const (
	xzHeaderLen   = 12
	xzFilterX86   = 0x04
	xzFilterLZMA2 = 0x21
	xzCheckNone   = 0x00
	xzCheckCRC32  = 0x01
	// maxXZDictionary bounds the decoder's memory; the kernel's build uses 32 MiB.
	maxXZDictionary = 256 << 20
)

// xzBlock is the header of an xz file's first block.
type xzBlock struct {
	check    byte
	filters  []uint64
	dictSize uint64
	// Where the compressed data start.
	data int
}

var errXZ = errors.New("malformed xz header")

// hasX86Filter reports whether b is an xz file with the x86 filter.
func hasX86Filter(b []byte) bool {
	block, err := parseXZBlock(b)
	return err == nil && len(block.filters) == 2 && block.filters[0] == xzFilterX86
}

func parseXZBlock(b []byte) (xzBlock, error) {
	if len(b) <= xzHeaderLen || b[xzHeaderLen] == 0 {
		return xzBlock{}, errXZ
	}
	size := (int(b[xzHeaderLen]) + 1) * 4
	if len(b) < xzHeaderLen+size {
		return xzBlock{}, errXZ
	}
	header := b[xzHeaderLen : xzHeaderLen+size]
	if crc32.ChecksumIEEE(header[:size-4]) != binary.LittleEndian.Uint32(header[size-4:]) {
		return xzBlock{}, errXZ
	}
	block := xzBlock{check: b[7], data: xzHeaderLen + size}
	flags, fields := header[1], bytes.NewReader(header[2:size-4])
	for _, present := range []byte{0x40, 0x80} { // compressed and uncompressed size: not needed
		if flags&present != 0 {
			if _, err := binary.ReadUvarint(fields); err != nil {
				return xzBlock{}, errXZ
			}
		}
	}
	for range int(flags&3) + 1 {
		if err := block.addFilter(fields); err != nil {
			return xzBlock{}, err
		}
	}
	return block, nil
}

func (x *xzBlock) addFilter(fields *bytes.Reader) error {
	id, err := binary.ReadUvarint(fields)
	if err != nil {
		return errXZ
	}
	size, err := binary.ReadUvarint(fields)
	if err != nil || size > uint64(fields.Len()) {
		return errXZ
	}
	properties := make([]byte, size)
	if _, err := io.ReadFull(fields, properties); err != nil {
		return errXZ
	}
	x.filters = append(x.filters, id)
	switch {
	case id == xzFilterLZMA2 && size == 1 && properties[0] < 40:
		x.dictSize = uint64(2|properties[0]&1) << (properties[0]/2 + 11)
	case id == xzFilterX86 && size == 0:
	case id == xzFilterX86:
		return errors.New("xz: the x86 filter with a start offset is not supported")
	}
	return nil
}

// newXZX86Reader unpacks the first block of an xz file with the x86 filter, and checks it.
func newXZX86Reader(b []byte) (io.Reader, error) {
	block, err := parseXZBlock(b)
	if err != nil {
		return nil, err
	}
	if block.filters[1] != xzFilterLZMA2 || block.dictSize == 0 || block.dictSize > maxXZDictionary {
		return nil, fmt.Errorf("unsupported filters %#x with a dictionary of %d bytes", block.filters, block.dictSize)
	}
	rest := bytes.NewReader(b[block.data:])
	r, err := lzma.Reader2Config{DictCap: int(block.dictSize)}.NewReader2(rest)
	if err != nil {
		return nil, err
	}
	out, err := readBounded(r, maxKernelELF)
	if err != nil {
		return nil, err
	}
	unfilterX86(out)
	return bytes.NewReader(out), checkXZ(block, out, b[len(b)-rest.Len():], (len(b)-rest.Len()-block.data)%4)
}

// checkXZ compares the check that follows the data and their padding to four bytes.
func checkXZ(block xzBlock, out, tail []byte, misalignment int) error {
	switch block.check {
	case xzCheckNone:
		return nil
	case xzCheckCRC32:
		tail = tail[min((4-misalignment)%4, len(tail)):]
		if len(tail) < 4 || crc32.ChecksumIEEE(out) != binary.LittleEndian.Uint32(tail) {
			return errors.New("checksum mismatch")
		}
		return nil
	default:
		return fmt.Errorf("unsupported check %d", block.check)
	}
}

// unfilterX86 undoes the x86 filter in place. The filter turned the relative targets of CALL (E8) and JMP (E9) into
// absolute ones, which pack better. Not every such byte is an instruction: the filter converts only targets whose high
// byte is 00 or FF, and looks at the opcodes seen in the four bytes before. This must follow its rules exactly.
func unfilterX86(b []byte) {
	const opcodeLen = 5
	isSign := func(c byte) bool { return c == 0x00 || c == 0xff }
	// Indexed by the history of the last three bytes, a bit for each that looked like an opcode and was not converted.
	allowed := [8]bool{true, true, true, false, true, false, false, false}
	bytesBack := [8]uint32{0, 1, 2, 2, 3, 3, 3, 3}

	history, last := uint32(0), -1
	for i := 0; i+opcodeLen <= len(b); i++ {
		if b[i]&0xfe != 0xe8 {
			continue
		}
		distance := i - last
		last = i
		if distance > 3 {
			history = 0
		} else if history = history << (distance - 1) & 7; history != 0 {
			if !allowed[history] || isSign(b[i+4-int(bytesBack[history])]) {
				history = history<<1 | 1
				continue
			}
		}
		if !isSign(b[i+4]) {
			history = history<<1 | 1
			continue
		}
		target := binary.LittleEndian.Uint32(b[i+1:])
		relative := target - uint32(i+opcodeLen)
		for history != 0 {
			shift := bytesBack[history] * 8
			if !isSign(byte(relative >> (24 - shift))) {
				break
			}
			target = relative ^ (1<<(32-shift) - 1)
			relative = target - uint32(i+opcodeLen)
		}
		// Sign-extended from 25 bits.
		relative &= 0x01ffffff
		relative |= -(relative & 0x01000000)
		binary.LittleEndian.PutUint32(b[i+1:], relative)
		i += opcodeLen - 1
	}
}
