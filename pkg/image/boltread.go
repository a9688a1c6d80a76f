package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
)

// bbolt takes the pages of its file for what they say: one that a disk or a hand has damaged makes it panic, read beyond its
// mapping or go round in circles. So the file is read here first, as bytes, each number checked before it is used; bbolt opens
// only what has passed. Format: internal/common/{meta,page,bucket,inode}.go of go.etcd.io/bbolt; numbers are the host's, which
// is little-endian.
const (
	boltMagic   = 0xED0CDAED
	boltVersion = 2

	boltPageHeader = 16 // id, flags, count, overflow
	boltMetaSum    = 56 // of a meta: what its checksum is of
	boltMetaSize   = boltMetaSum + 8
	boltElement    = 16 // of a branch or a leaf page
	boltBucketHead = 16 // a bucket's root page and sequence; its page itself follows where the root is 0
	boltManyFree   = 0xFFFF
	boltMinPage    = 512
	boltMaxPage    = 64 << 10

	boltBranch    = 0x01
	boltLeaf      = 0x02
	boltMeta      = 0x04
	boltFreelist  = 0x10
	boltSubBucket = 0x01
	// boltDepth bounds how deep buckets and branches are nested: a tree of it holds more than a disk.
	boltDepth = 32
)

var (
	errBoltVersion = errors.New("it is of another version of its format")
	errBolt        = errors.New("it is damaged")
)

// boltContent is what a file holds: its buckets, and the number of its last change.
type boltContent struct {
	change  uint64
	buckets map[string]map[string][]byte
}

type boltReader struct {
	b        []byte
	pageSize uint64
	pages    uint64 // beyond the last in use
	seen     map[uint64]bool
}

func boltErrorf(format string, args ...any) error {
	return fmt.Errorf("%w: %w", errBolt, fmt.Errorf(format, args...))
}

// readBolt reads a whole file. What it answers points into b.
func readBolt(b []byte) (*boltContent, error) {
	r := &boltReader{b: b, seen: map[uint64]bool{0: true, 1: true}}
	if len(b) < boltPageHeader+boltMetaSize {
		return nil, boltErrorf("it ends after %d bytes", len(b))
	}
	r.pageSize = uint64(binary.LittleEndian.Uint32(b[boltPageHeader+8:]))
	if r.pageSize < boltMinPage || r.pageSize > boltMaxPage || r.pageSize&(r.pageSize-1) != 0 || uint64(len(b)) < 2*r.pageSize {
		return nil, boltErrorf("its pages have %d bytes", r.pageSize)
	}
	var last []byte
	versions := map[uint32]int{}
	for i := range uint64(2) {
		p := b[i*r.pageSize:]
		m := p[boltPageHeader : boltPageHeader+boltMetaSize]
		h := fnv.New64a()
		_, _ = h.Write(m[:boltMetaSum]) // a hash never fails
		magic, version := binary.LittleEndian.Uint32(m), binary.LittleEndian.Uint32(m[4:])
		if magic == boltMagic {
			versions[version]++
		}
		switch {
		case magic == boltMagic && version != boltVersion && versions[version] == 2:
			return nil, fmt.Errorf("%w: %d, and this sandboxd knows %d", errBoltVersion, version, boltVersion)
		case magic == boltMagic && version != boltVersion && i == 0:
			continue // the second says whether it is the version or a damage
		case magic != boltMagic || version != boltVersion, binary.LittleEndian.Uint64(m[boltMetaSum:]) != h.Sum64(),
			binary.LittleEndian.Uint64(p) != i, binary.LittleEndian.Uint16(p[8:]) != boltMeta, uint64(binary.LittleEndian.Uint32(m[8:])) != r.pageSize:
			return nil, boltErrorf("head %d", i)
		}
		if last == nil || binary.LittleEndian.Uint64(m[48:]) > binary.LittleEndian.Uint64(last[48:]) {
			last = m
		}
	}
	if versions[boltVersion] != 2 {
		return nil, boltErrorf("head 0")
	}
	root, free := binary.LittleEndian.Uint64(last[16:]), binary.LittleEndian.Uint64(last[32:])
	r.pages = binary.LittleEndian.Uint64(last[40:])
	if r.pages > uint64(len(b))/r.pageSize {
		return nil, boltErrorf("it ends after %d of its %d pages", uint64(len(b))/r.pageSize, r.pages)
	}
	c := &boltContent{change: binary.LittleEndian.Uint64(last[48:]), buckets: map[string]map[string][]byte{}}
	err := r.tree(root, nil, nil, 0, func(name, v []byte, bucket bool) error {
		if !bucket || len(v) < boltBucketHead {
			return boltErrorf("%q is no bucket", name)
		}
		in := map[string][]byte{}
		c.buckets[string(name)] = in
		each := func(k, v []byte, bucket bool) error {
			if bucket {
				return boltErrorf("bucket %q within a bucket", k)
			}
			in[string(k)] = v
			return nil
		}
		if root := binary.LittleEndian.Uint64(v); root != 0 {
			return r.tree(root, nil, nil, 0, each)
		}
		return r.elements(v[boltBucketHead:], nil, nil, 0, each)
	})
	if err == nil {
		err = r.freelist(free)
	}
	if err != nil {
		return nil, err
	}
	return c, nil
}

// page answers with a page, those that it runs over into counted, and takes it as used.
func (r *boltReader) page(id uint64) ([]byte, error) {
	if id >= r.pages {
		return nil, boltErrorf("page %d of %d", id, r.pages)
	}
	p := r.b[id*r.pageSize:]
	over := uint64(binary.LittleEndian.Uint32(p[12:]))
	if binary.LittleEndian.Uint64(p) != id || id+over >= r.pages {
		return nil, boltErrorf("page %d says that it is %d, with %d more", id, binary.LittleEndian.Uint64(p), over)
	}
	for i := id; i <= id+over; i++ {
		if r.seen[i] {
			return nil, boltErrorf("page %d is used twice", i)
		}
		r.seen[i] = true
	}
	return p[:(1+over)*r.pageSize], nil
}

// tree calls each for all that is below a page. Keys must be from least on, and below beyond if that is not nil.
func (r *boltReader) tree(id uint64, least, beyond []byte, depth int, each func(k, v []byte, bucket bool) error) error {
	p, err := r.page(id)
	if err != nil {
		return err
	}
	return r.elements(p, least, beyond, depth, each)
}

func (r *boltReader) elements(p, least, beyond []byte, depth int, each func(k, v []byte, bucket bool) error) error {
	if len(p) < boltPageHeader || depth > boltDepth {
		return boltErrorf("a page of %d bytes, %d deep", len(p), depth)
	}
	flags, count := binary.LittleEndian.Uint16(p[8:]), int(binary.LittleEndian.Uint16(p[10:]))
	if flags != boltBranch && flags != boltLeaf || boltPageHeader+count*boltElement > len(p) {
		return boltErrorf("a page of kind %d with %d elements", flags, count)
	}
	type element struct {
		key, value []byte
		child      uint64
		bucket     bool
	}
	all := make([]element, 0, count)
	for i := range count {
		at := uint64(boltPageHeader + i*boltElement)
		h := p[at : at+boltElement]
		var e element
		var pos, keyLen, valueLen uint64
		if flags == boltBranch {
			pos, keyLen = uint64(binary.LittleEndian.Uint32(h)), uint64(binary.LittleEndian.Uint32(h[4:]))
			e.child = binary.LittleEndian.Uint64(h[8:])
		} else {
			kind := binary.LittleEndian.Uint32(h)
			if kind > boltSubBucket {
				return boltErrorf("an element of kind %d", kind)
			}
			e.bucket = kind == boltSubBucket
			pos, keyLen, valueLen = uint64(binary.LittleEndian.Uint32(h[4:])), uint64(binary.LittleEndian.Uint32(h[8:])), uint64(binary.LittleEndian.Uint32(h[12:]))
		}
		if at+pos+keyLen+valueLen > uint64(len(p)) || pos < boltElement {
			return boltErrorf("an element reaches beyond its page")
		}
		e.key, e.value = p[at+pos:at+pos+keyLen], p[at+pos+keyLen:at+pos+keyLen+valueLen]
		if bytes.Compare(e.key, least) < 0 || beyond != nil && bytes.Compare(e.key, beyond) >= 0 || i > 0 && bytes.Compare(e.key, all[i-1].key) <= 0 {
			return boltErrorf("keys are not in order")
		}
		all = append(all, e)
	}
	for i, e := range all {
		if flags == boltLeaf {
			if err := each(e.key, e.value, e.bucket); err != nil {
				return err
			}
			continue
		}
		end := beyond
		if i+1 < len(all) {
			end = all[i+1].key
		}
		if err := r.tree(e.child, e.key, end, depth+1, each); err != nil {
			return err
		}
	}
	return nil
}

// freelist checks that each page is either used or free: one that is both would be written over.
func (r *boltReader) freelist(id uint64) error {
	p, err := r.page(id)
	if err != nil {
		return err
	}
	count, at := uint64(binary.LittleEndian.Uint16(p[10:])), uint64(boltPageHeader)
	if count == boltManyFree {
		count, at = binary.LittleEndian.Uint64(p[at:]), at+8
	}
	if binary.LittleEndian.Uint16(p[8:]) != boltFreelist || count > (uint64(len(p))-at)/8 {
		return boltErrorf("the list of free pages")
	}
	for i := range count {
		free := binary.LittleEndian.Uint64(p[at+8*i:])
		if free >= r.pages || r.seen[free] {
			return boltErrorf("page %d is free, and used", free)
		}
		r.seen[free] = true
	}
	if uint64(len(r.seen)) != r.pages {
		return boltErrorf("%d pages of %d are used or free", len(r.seen), r.pages)
	}
	return nil
}
