package microvm

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"

	"golang.org/x/sys/unix"
)

// A writable layer that its guest did not unmount (the VM was killed) is checked before the next guest uses it. What a
// guest wrote is hostile to e2fsck, too: it runs like QEMU does, unprivileged, in the VM's cgroup and namespaces of
// its own, with one descriptor.

// The ext4 superblock's s_state, and its value for a file system that was unmounted and has no known errors.
const (
	ext4StateOffset = 1024 + 0x3a
	ext4StateMask   = 3
	ext4StateClean  = 1
	// e2fsck's exit code when it corrected everything.
	fsckCorrected = 1
)

// repairLayer makes the layer consistent; it costs one read if it is.
func (b *boot) repairLayer(ctx context.Context) error {
	f, err := b.keep(os.OpenFile(b.layer, os.O_RDWR|unix.O_NOFOLLOW, 0))
	if err != nil {
		return fmt.Errorf("cannot open the writable layer: %w", err)
	}
	var state [2]byte
	if _, err := f.ReadAt(state[:], ext4StateOffset); err != nil {
		return fmt.Errorf("cannot read the writable layer: %w", err)
	}
	if binary.LittleEndian.Uint16(state[:])&ext4StateMask == ext4StateClean {
		return nil
	}
	return b.fsck(ctx, f)
}

// fsck runs e2fsck on the layer, confined, and waits for it until ctx is done.
func (b *boot) fsck(ctx context.Context, layer *os.File) (err error) {
	path, err := exec.LookPath("e2fsck")
	if err != nil {
		return fmt.Errorf("cannot check the writable layer: %w; install e2fsprogs", err)
	}
	fsck, err := b.voice(b.voices.log.Source("e2fsck: ", nil))
	if err != nil {
		return err
	}
	defer fsck.end()
	// It opens the file as its own user.
	if err := layer.Chown(int(b.uid), int(b.uid)); err != nil {
		return fmt.Errorf("cannot hand over the writable layer: %w", err)
	}
	defer func() {
		if cerr := layer.Chown(0, 0); cerr != nil {
			err = errors.Join(err, fmt.Errorf("cannot take back the writable layer: %w", cerr))
		}
	}()
	c := command{path: path, args: []string{"-p", "-f", layerPath}, out: fsck.child, err: fsck.child, uid: b.uid}
	if c.jail, err = b.jail(path, jailed{from: b.layer, at: layerPath, writable: true, reason: "what it checks"}); err != nil {
		return err
	}
	_, pidfd, err := c.start(b.group)
	if err != nil {
		return err
	}
	defer pidfd.Close() //nolint:errcheck // nothing to lose
	stop := context.AfterFunc(ctx, func() { _ = killProcess(pidfd) })
	status, err := waitExit(pidfd)
	stop()
	fsck.end()
	switch {
	case err != nil:
		return fmt.Errorf("cannot wait for e2fsck: %w", err)
	case ctx.Err() != nil:
		return fmt.Errorf("cannot check the writable layer: %w", ctx.Err())
	case status.signal != 0 || status.code > fsckCorrected:
		return fmt.Errorf("cannot repair the writable layer: e2fsck %v: %s; delete the workload to start afresh", status, fsck.source.Quote())
	}
	return nil
}
