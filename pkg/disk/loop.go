package disk

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// loopTries bounds the race for a free loop device: every try that fails means that someone else took one.
	loopTries = 64
	// loopPause is how long to wait for devtmpfs to show the node of a device the kernel just made.
	loopPause = time.Millisecond
)

// attaching has this process's callers take turns: the kernel tells whoever asks which device is free, and all of 200 callers the
// same one.
var attaching sync.Mutex

// AttachLoop puts file behind a free loop device and answers with the device, open. The kernel frees the device once it
// is closed and nothing has it mounted any more (LO_FLAGS_AUTOCLEAR), whoever dies. Read-only is enforced by the kernel
// whatever file was opened for.
func AttachLoop(file *os.File, readOnly bool) (*os.File, error) {
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("cannot attach a loop device: %w", err)
	}
	defer control.Close() //nolint:errcheck // nothing is written to it
	config := unix.LoopConfig{Fd: uint32(file.Fd()), Size: 0}
	config.Info.Flags = unix.LO_FLAGS_AUTOCLEAR
	mode := os.O_RDWR
	if readOnly {
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
		mode = os.O_RDONLY
	}
	attaching.Lock()
	defer attaching.Unlock()
	for range loopTries {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("cannot find a free loop device: %w", err)
		}
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), mode|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENXIO) {
			time.Sleep(loopPause)
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("cannot open a loop device: %w", err)
		}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &config)
		if err == nil {
			return loop, nil
		}
		_ = loop.Close() // nothing was attached
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("cannot attach a loop device: %w", err)
		}
	}
	return nil, fmt.Errorf("cannot attach a loop device: lost the race for a free one %d times", loopTries)
}

const (
	// detachTimeout bounds WaitDetached: the last writes of a sandbox go to disk meanwhile.
	detachTimeout = 20 * time.Second
	// detachPoll paces it; a layer without dirty pages is free in about a millisecond.
	detachPoll = 500 * time.Microsecond
	// loopDetachPoll paces WaitLoopDetached, for which nobody waits.
	loopDetachPoll = 5 * time.Millisecond
)

// WaitDetached waits until no loop device has the file at path behind it any more: the kernel unmounts the file system
// of a sandbox that ended a moment after its last process.
func WaitDetached(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, detachTimeout)
	defer cancel()
	for {
		loop, err := loopOf(path)
		if err != nil {
			return fmt.Errorf("cannot find the loop device of %s: %w", path, err)
		}
		if loop == "" {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cannot wait for %s to leave %s: %w", loop, path, ctx.Err())
		case <-time.After(detachPoll):
		}
	}
}

// WaitLoopDetached is WaitDetached where the device is known: it looks at that one only.
func WaitLoopDetached(ctx context.Context, loop, path string) error {
	ctx, cancel := context.WithTimeout(ctx, detachTimeout)
	defer cancel()
	path = resolved(path)
	for {
		b, err := os.ReadFile(filepath.Join("/sys/block", loop, "loop/backing_file"))
		if err != nil || backingOf(b) != path {
			return nil // free, or another's by now
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cannot wait for %s to leave %s: %w", loop, path, ctx.Err())
		case <-time.After(loopDetachPoll):
		}
	}
}

// backingOf is the file that the kernel names in a backing_file of sysfs.
func backingOf(b []byte) string {
	return strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), " (deleted)")
}

// resolved is path as the kernel names it: as it lies now, with links resolved.
func resolved(path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	if dir, err := filepath.EvalSymlinks(filepath.Dir(path)); err == nil {
		path = filepath.Join(dir, filepath.Base(path))
	}
	return path
}

// loopOf names the loop device that has the file at path behind it; empty if none has.
func loopOf(path string) (string, error) {
	path = resolved(path)
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return "", err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue // detached meanwhile
		}
		if backingOf(b) == path {
			return filepath.Base(filepath.Dir(filepath.Dir(f))), nil
		}
	}
	return "", nil
}
