package image

import (
	"sync/atomic"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	mib = 1 << 20
	gib = 1 << 30
)

// limits bound what one import may cost the host. An image is hostile input: whoever may import must not be able to fill
// memory or, past what these say, the disk.
type limits struct {
	// Bytes of an archive, or of an image's blobs together, as they come.
	received int64
	// Bytes after decompression of an archive and of all layers together: what may be spooled.
	content int64
	// Decompression may yield floor + factor times what went in. Tars of files stay below 20; gzip reaches 1032.
	expandFloor  int64
	expandFactor int64
	// Tar entries of all layers together.
	entries int
	// What the merged tree costs in memory while its file is written: see budget.entry.
	memory int64
	layers int
	// Bytes of one manifest, index or configuration.
	document int64
}

var defaultLimits = limits{
	received:     16 * gib,
	content:      32 * gib,
	expandFloor:  1 * gib,
	expandFactor: 200,
	entries:      1_000_000,
	memory:       2 * gib,
	layers:       256, // docker builds at most 127
	document:     4 * mib,
}

const (
	// maxName is Linux's NAME_MAX and EROFS's.
	maxName = 255
	// maxPath is Linux's PATH_MAX without the final NUL. It also bounds how deep the tree goes, and with it recursion.
	maxPath = 4095
	// maxXattrs bounds one inode's extended attributes in bytes: names and values. Linux reads no list longer than 64 KiB, and
	// EROFS counts an inode's attributes in 16 bits.
	maxXattrs = 64 << 10
	// entryCost is what an entry holds in memory beyond its own strings, here and in the EROFS writer: measured about 1 KiB.
	entryCost = 1 << 10
	// inlineData is the largest file that the EROFS writer may keep in memory, beside its inode, until the end.
	inlineData = 4096
)

// budget is what one import has used of its limits. Layers are unpacked concurrently, so it counts atomically.
type budget struct {
	limits
	usedReceived, usedContent, usedEntries, usedMemory atomic.Int64
}

func (b *budget) receive(n int) error {
	if b.usedReceived.Add(int64(n)) > b.received {
		return invalidf("it is larger than %d MiB", b.received/mib)
	}
	return nil
}

func (b *budget) expand(n int) error {
	if b.usedContent.Add(int64(n)) > b.content {
		return invalidf("it holds more than %d MiB after decompression", b.content/mib)
	}
	return nil
}

// bomb is the fault of what grows more in decompression than any real file.
func (b *budget) bomb() error {
	return invalidf("it expands to more than %d times its size: no real image does", b.expandFactor)
}

// entry counts one tar entry with the bytes of its strings: path, link target, extended attributes, and data small
// enough to be kept inline.
func (b *budget) entry(bytes int64) error {
	if b.usedEntries.Add(1) > int64(b.entries) {
		return invalidf("it has more than %d files", b.entries)
	}
	if b.usedMemory.Add(entryCost+bytes) > b.memory {
		return invalidf("its directory tree needs more than %d MiB of memory to merge", b.memory/mib)
	}
	return nil
}

// invalidf says what makes an image unusable, as the end of a sentence that names the image.
func invalidf(format string, args ...any) *spec.Error {
	return spec.Invalidf("image", format, args...)
}
