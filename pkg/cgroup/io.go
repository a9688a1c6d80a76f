package cgroup

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// IO limits what a group reads from and writes to one disk, a second; zero means no limit.
type IO struct {
	// A file or directory on that disk.
	Disk                string
	ReadBPS, WriteBPS   uint64
	ReadIOPS, WriteIOPS uint32
	// The group's processes write past the page cache, so that cgroup v1, too, knows whose writes they are. With v2 it is enough
	// that they are not put off in a file which another group wrote first.
	Direct bool
}

func (i IO) limited() bool {
	return i.ReadBPS > 0 || i.WriteBPS > 0 || i.ReadIOPS > 0 || i.WriteIOPS > 0
}

// loopMajor is the loop devices' number. What goes through one goes through the disk below it too, and counts there.
const loopMajor = 7

// device is a block device's number.
type device struct{ major, minor uint32 }

func (d device) String() string { return fmt.Sprintf("%d:%d", d.major, d.minor) }

// diskOf is the disk that a path lies on. The kernel limits whole disks, never partitions.
func diskOf(path string) (device, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return device{}, fmt.Errorf("cannot see what disk %s is on: %w", path, err)
	}
	d := device{unix.Major(st.Dev), unix.Minor(st.Dev)}
	sys, err := filepath.EvalSymlinks("/sys/dev/block/" + d.String())
	if err != nil {
		return device{}, fmt.Errorf("%s is on a file system without a disk of its own (device %s): put the state directory onto ext4 or xfs", path, d)
	}
	if !exists(filepath.Join(sys, "partition")) {
		return d, nil
	}
	b, err := os.ReadFile(filepath.Join(filepath.Dir(sys), "dev"))
	if err != nil {
		return device{}, fmt.Errorf("cannot see what disk %s is on: %w", path, err)
	}
	if _, err := fmt.Sscanf(string(b), "%d:%d", &d.major, &d.minor); err != nil {
		return device{}, fmt.Errorf("cannot see what disk %s is on: %w", path, err)
	}
	return d, nil
}

// ioMax is a line for v2's io.max.
func (i IO) ioMax(d device) string {
	line := d.String()
	for _, l := range []struct {
		key   string
		value uint64
	}{{"rbps", i.ReadBPS}, {"wbps", i.WriteBPS}, {"riops", uint64(i.ReadIOPS)}, {"wiops", uint64(i.WriteIOPS)}} {
		value := "max"
		if l.value > 0 {
			value = strconv.FormatUint(l.value, 10)
		}
		line += " " + l.key + "=" + value
	}
	return line
}

// parseIOStat adds up v2's io.stat: "8:0 rbytes=1 wbytes=2 rios=3 wios=4 …". What was written is what a disk was given in the
// group's name, or what a loop device was, if that is more: what waits in the page cache of a loop device's file reaches the disk in
// the name of who wrote the file first.
func parseIOStat(text string, u *spec.Usage) {
	var loops spec.Usage
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) == 0 {
			continue
		}
		to := u
		if strings.HasPrefix(words[0], strconv.Itoa(loopMajor)+":") {
			to = &loops
		}
		fields := map[string]*uint64{"rbytes": &to.IOReadBytes, "wbytes": &to.IOWriteBytes, "rios": &to.IOReads, "wios": &to.IOWrites}
		for _, w := range words[1:] {
			key, value, _ := strings.Cut(w, "=")
			if into := fields[key]; into != nil {
				n, _ := strconv.ParseUint(value, 10, 64) // the kernel's own
				*into += n
			}
		}
	}
	if loops.IOWriteBytes > u.IOWriteBytes {
		u.IOWriteBytes, u.IOWrites = loops.IOWriteBytes, loops.IOWrites
	}
}

// parseThrottle adds up a file of v1's blkio.throttle: "8:0 Read 1".
func parseThrottle(text string, read, write *uint64) {
	into := map[string]*uint64{"Read": read, "Write": write}
	for line := range strings.Lines(text) {
		words := strings.Fields(line)
		if len(words) != 3 || into[words[1]] == nil || strings.HasPrefix(words[0], strconv.Itoa(loopMajor)+":") {
			continue
		}
		n, _ := strconv.ParseUint(words[2], 10, 64) // the kernel's own
		*into[words[1]] += n
	}
}
