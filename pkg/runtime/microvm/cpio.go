package microvm

import (
	"bytes"
	"fmt"
	"io/fs"

	"golang.org/x/sys/unix"
)

// An initramfs is one or several cpio archives of the kind "newc", one after the other. Format:
// Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.

// cpioEntry is a file, directory or device of the archive, root's.
type cpioEntry struct {
	path string // without a leading slash
	mode uint32 // type and permissions, as in struct stat
	data []byte
	// Of a device.
	major, minor uint32
}

// cpioAlign is what an archive's length is padded to, so that another may follow.
const cpioAlign = 512

// cpioArchive writes entries in order: a directory must come before what it holds. The same entries give the same bytes.
func cpioArchive(entries []cpioEntry) []byte {
	var b bytes.Buffer
	for i, e := range entries {
		writeCPIO(&b, uint32(i+1), e)
	}
	writeCPIO(&b, 0, cpioEntry{path: "TRAILER!!!"})
	pad(&b, cpioAlign)
	return b.Bytes()
}

func writeCPIO(b *bytes.Buffer, inode uint32, e cpioEntry) {
	// magic, then thirteen numbers: inode, mode, uid, gid, links, mtime, size, device (2), rdev (2), name size, checksum
	fmt.Fprintf(b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		inode, e.mode, 0, 0, 1, 0, len(e.data), 0, 0, e.major, e.minor, len(e.path)+1, 0)
	b.WriteString(e.path)
	b.WriteByte(0)
	pad(b, 4)
	b.Write(e.data)
	pad(b, 4)
}

func pad(b *bytes.Buffer, align int) {
	b.Write(make([]byte, (align-b.Len()%align)%align))
}

func cpioDir(path string, perm fs.FileMode) cpioEntry {
	return cpioEntry{path: path, mode: unix.S_IFDIR | uint32(perm)}
}

func cpioFile(path string, perm fs.FileMode, data []byte) cpioEntry {
	return cpioEntry{path: path, mode: unix.S_IFREG | uint32(perm), data: data}
}

func cpioDevice(path string, perm fs.FileMode, major, minor uint32) cpioEntry {
	return cpioEntry{path: path, mode: unix.S_IFCHR | uint32(perm), major: major, minor: minor}
}
