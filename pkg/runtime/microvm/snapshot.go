package microvm

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

// A snapshot is a guest as it was in the middle of its life: all of it is secret to its owner.
//
//	dir/              0700, the caller's
//	    state         what QEMU writes when it migrates, the guest's memory included
//	    disk.ext4     the writable layer
//	    vm.json       written last: what is in the others, with their sums, and the token by which its agent knows the daemon
//
// Its agent is reached over a virtio-serial port: a byte stream that survives being copied, where a vhost-user device can't be
// migrated at all. docs/decisions says more.
const (
	snapshotMetaFile = "vm.json"
	snapshotDiskFile = "disk.ext4"
	snapshotFormat   = 1
	// maxSnapshotBytes bounds a guest's memory, and with maxTemplateState its state.
	maxSnapshotBytes = 1 << 42
)

// snapshotMeta is what is known of a snapshot.
type snapshotMeta struct {
	Format      int    `json:"format"`
	Accelerator string `json:"accelerator"`
	// The program that wrote the state: another may not understand it.
	QEMU        string `json:"qemu"`
	CPUs        uint32 `json:"cpus"`
	MemoryBytes uint64 `json:"memoryBytes"`
	DiskBytes   uint64 `json:"diskBytes"`
	// Of the guest that it was taken of, in hexadecimal.
	Token    string `json:"token"`
	StateSum string `json:"stateSum"`
	DiskSum  string `json:"diskSum"`
}

var (
	_ runtime.Snapshotter = (*instance)(nil)
	_ runtime.Restorer    = (*Runtime)(nil)
)

// readSnapshotMeta reads what a snapshot says of itself.
func readSnapshotMeta(dir string) (snapshotMeta, error) {
	b, err := wholefile.ReadOwn(filepath.Join(dir, snapshotMetaFile), maxRecord)
	if err != nil {
		return snapshotMeta{}, damagedSnapshot(err)
	}
	return parseSnapshotMeta(b)
}

// parseSnapshotMeta accepts what a snapshot may be: nothing in it is used before.
func parseSnapshotMeta(b []byte) (snapshotMeta, error) {
	var m snapshotMeta
	if err := json.Unmarshal(b, &m); err != nil {
		return snapshotMeta{}, damagedSnapshot(err)
	}
	if m.Format != snapshotFormat {
		return snapshotMeta{}, spec.Errorf(spec.KindWrongState, "cannot use a snapshot of format %d: this sandboxd reads %d", m.Format, snapshotFormat)
	}
	_, err := (record{Token: m.Token}).token()
	switch {
	case err != nil:
	case m.CPUs < 1 || m.CPUs > maxCPUs:
		err = fmt.Errorf("it has %d processors", m.CPUs)
	case m.MemoryBytes < minGuestMemory || m.MemoryBytes > maxSnapshotBytes:
		err = fmt.Errorf("it has %d bytes of memory", m.MemoryBytes)
	case m.DiskBytes < disk.MinSize || m.DiskBytes > disk.MaxSize:
		err = fmt.Errorf("its disk has %d bytes", m.DiskBytes)
	}
	if err != nil {
		return snapshotMeta{}, damagedSnapshot(err)
	}
	return m, nil
}

func damagedSnapshot(err error) error {
	return spec.Errorf(spec.KindWrongState, "the snapshot is damaged: %w; remove it, and take another", err)
}

// fits refuses a snapshot that this host, as it is now, can't go on from.
func (m snapshotMeta) fits(accel, qemu string) error {
	switch {
	case m.Accelerator != accel:
		return spec.Errorf(spec.KindWrongState, "cannot go on from a snapshot that was taken under %s: VMs run under %s here now", m.Accelerator, accel)
	case m.QEMU != qemu:
		return spec.Errorf(spec.KindWrongState, "cannot go on from a snapshot that another QEMU took (%s): here is %s", m.QEMU, qemu)
	}
	return nil
}

// qemuIdentity tells one QEMU from another.
func (r *Runtime) qemuIdentity() (string, error) {
	path, err := r.qemuPath()
	if err != nil {
		return "", err
	}
	info, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("cannot examine QEMU: %w", err)
	}
	return fmt.Sprintf("%s %d %d", path, info.Size(), info.ModTime().UnixNano()), nil
}

// openSnapshotFile opens one of its files if it is as its sum says.
func openSnapshotFile(dir, name string, limit uint64, sum string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, damagedSnapshot(err)
	}
	info, err := f.Stat()
	if err == nil && (!info.Mode().IsRegular() || uint64(info.Size()) > limit) {
		err = fmt.Errorf("%s is no file of at most %d bytes", name, limit)
	}
	if err == nil && sum != "" {
		var got string
		if got, err = sumSparse(f); err == nil && got != sum {
			err = fmt.Errorf("%s is not what was written", name)
		}
	}
	if err == nil {
		_, err = f.Seek(0, io.SeekStart) // QEMU reads on from where we are
	}
	if err != nil {
		return nil, errors.Join(damagedSnapshot(err), f.Close())
	}
	return f, nil
}
