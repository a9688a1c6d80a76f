package disk

import (
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// loopTries bounds the race for a free loop device: every try that fails means that someone else took one.
	loopTries = 64
	// loopPause is how long to wait for devtmpfs to show the node of a device the kernel just made.
	loopPause = time.Millisecond
)

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
