package image

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
)

// The EROFS writer has two shortcomings that only the finished file lets us mend: every name has an inode of its own, and
// the root is inode 0, which readers of directories take for a deleted file. So every directory entry is rewritten: further
// names of an inode come to point to the first one's (the empty inodes they had stay behind, unreachable, 32 bytes each),
// and inode numbers, which count 32-byte slots from the start of the metadata, are counted from one block earlier.
//
// On-disk format: Documentation/filesystems/erofs.rst and fs/erofs/erofs_fs.h of Linux. All numbers are little-endian.
const (
	superOffset = 1024
	superMagic  = 0xe0f5e1e2

	superBlockBits = superOffset + 12
	superRootNid   = superOffset + 14
	superInos      = superOffset + 16
	superMetaBlock = superOffset + 40
	superUUID      = superOffset + 48
	superEnd       = superOffset + 128

	inodeSlot     = 32
	nidShift      = blockSize / inodeSlot
	inodeCompact  = 32
	inodeExtended = 64

	layoutPlain  = 0
	layoutInline = 2

	direntSize    = 12
	direntNameOff = 8
)

var errFormat = errors.New("the EROFS writer wrote what it should not")

// finisher rewrites the directories of a file the EROFS writer has just written from root.
type finisher struct {
	f         *os.File
	metaStart int64
}

func finishErofs(f *os.File, root *inode, inodes int, digest string) error {
	super := make([]byte, superEnd)
	if _, err := f.ReadAt(super, 0); err != nil {
		return err
	}
	meta := binary.LittleEndian.Uint32(super[superMetaBlock:])
	if binary.LittleEndian.Uint32(super[superOffset:]) != superMagic || 1<<super[superBlockBits] != blockSize || meta == 0 {
		return errFormat
	}
	fin := &finisher{f, int64(meta) * blockSize}
	root.nid = uint64(binary.LittleEndian.Uint16(super[superRootNid:]))
	if err := fin.directory(root, root.nid); err != nil {
		return err
	}
	binary.LittleEndian.PutUint16(super[superRootNid:], uint16(root.nid+nidShift))
	binary.LittleEndian.PutUint32(super[superMetaBlock:], meta-1)
	binary.LittleEndian.PutUint64(super[superInos:], uint64(inodes))
	// An identity lets overlayfs tell this lower layer from any other.
	if _, err := hex.Decode(super[superUUID:superUUID+16], []byte(strings.TrimPrefix(digest, digestPrefix)[:32])); err != nil {
		return err
	}
	_, err := f.WriteAt(super[superOffset:], superOffset)
	return err
}

// directory rewrites one directory and all below it, in the order in which freeze found the first name of each inode: an
// inode's number is known before a further name needs it.
func (fin *finisher) directory(dir *inode, parent uint64) error {
	data, at, err := fin.directoryData(dir.nid)
	if err != nil {
		return err
	}
	next := 0
	for start := 0; start < len(data); start += blockSize {
		block := data[start:min(start+blockSize, len(data))]
		if len(block) < direntSize {
			return errFormat
		}
		count := int(binary.LittleEndian.Uint16(block[direntNameOff:])) / direntSize
		if count == 0 || count*direntSize > len(block) {
			return errFormat
		}
		for i := range count {
			nid, err := fin.entry(dir, parent, &next, block, i, count)
			if err != nil {
				return err
			}
			binary.LittleEndian.PutUint64(block[i*direntSize:], nid+nidShift)
		}
	}
	if next != len(dir.entries) {
		return fmt.Errorf("%w: a directory has %d names instead of %d", errFormat, next, len(dir.entries))
	}
	if _, err := fin.f.WriteAt(data, at); err != nil {
		return err
	}
	for i := range dir.entries {
		if child := dir.entries[i].inode; child.isDir() {
			if err := fin.directory(child, dir.nid); err != nil {
				return err
			}
		}
	}
	return nil
}

// entry says which inode the i-th of count entries of a directory block is to point to, checking that it bears the name
// which the tree has next.
func (fin *finisher) entry(dir *inode, parent uint64, next *int, block []byte, i, count int) (uint64, error) {
	nid := binary.LittleEndian.Uint64(block[i*direntSize:])
	from, to := int(binary.LittleEndian.Uint16(block[i*direntSize+direntNameOff:])), len(block)
	if i+1 < count {
		to = int(binary.LittleEndian.Uint16(block[(i+1)*direntSize+direntNameOff:]))
	}
	if from > to || to > len(block) {
		return 0, errFormat
	}
	name := strings.TrimRight(string(block[from:to]), "\x00")
	switch name {
	case ".":
		return dir.nid, nil
	case "..":
		return parent, nil
	}
	if *next >= len(dir.entries) || dir.entries[*next].name != name {
		return 0, fmt.Errorf("%w: the name %s is not next in its directory", errFormat, quote(name))
	}
	child := dir.entries[*next]
	*next++
	if child.first {
		child.nid = nid
	}
	if child.nid == 0 { // the root's until now
		return 0, fmt.Errorf("%w: %s has no inode", errFormat, quote(name))
	}
	return child.nid, nil
}

// directoryData reads a directory's entries and says where they are.
func (fin *finisher) directoryData(nid uint64) ([]byte, int64, error) {
	at := fin.metaStart + int64(nid)*inodeSlot
	var head [inodeCompact]byte
	if _, err := fin.f.ReadAt(head[:], at); err != nil {
		return nil, 0, err
	}
	format := binary.LittleEndian.Uint16(head[0:])
	xattrCount := int64(binary.LittleEndian.Uint16(head[2:]))
	size := uint64(binary.LittleEndian.Uint32(head[8:]))
	inodeLen := int64(inodeCompact)
	if format&1 != 0 {
		inodeLen = inodeExtended
		size = binary.LittleEndian.Uint64(head[8:])
	}
	var where int64
	switch format >> 1 & 7 {
	case layoutPlain:
		where = int64(binary.LittleEndian.Uint32(head[16:])) * blockSize
	case layoutInline:
		where = at + inodeLen
		if xattrCount > 0 {
			where += 12 + (xattrCount-1)*4
		}
	default:
		return nil, 0, fmt.Errorf("%w: a directory of layout %d", errFormat, format>>1&7)
	}
	if size > maxDirectory {
		return nil, 0, fmt.Errorf("%w: a directory of %d bytes", errFormat, size)
	}
	data := make([]byte, size)
	_, err := fin.f.ReadAt(data, where)
	return data, where, err
}

// maxDirectory is beyond what the entries and memory allowed to an import can make of one directory.
const maxDirectory = 4 * gib
