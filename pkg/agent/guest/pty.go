package guest

import (
	"errors"
	"fmt"
	"os"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// maxTerminalSize bounds rows and columns: struct winsize has 16 bits for each.
const maxTerminalSize = 1<<16 - 1

// openTerminal makes a terminal in the container's own devpts, so that the name the workload sees for it exists there.
// The slave is reached through the master (TIOCGPTPEER), not by name.
func openTerminal(pts *os.File, size *specs.Box) (master, slave *os.File, err error) {
	if pts == nil {
		return nil, nil, errors.New("cannot make a terminal: the container has no devpts")
	}
	fd, err := unix.Openat(int(pts.Fd()), "ptmx", unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot open ptmx: %w", err)
	}
	if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
		unix.Close(fd)
		return nil, nil, fmt.Errorf("cannot unlock a terminal: %w", err)
	}
	peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
	if errno != 0 {
		unix.Close(fd)
		return nil, nil, fmt.Errorf("cannot open a terminal's slave: %w", errno)
	}
	slave = os.NewFile(peer, "terminal")
	if size != nil && size.Height > 0 && size.Width > 0 {
		if err := setTerminalSize(fd, uint32(min(size.Height, maxTerminalSize)), uint32(min(size.Width, maxTerminalSize))); err != nil {
			unix.Close(fd)
			slave.Close()
			return nil, nil, err
		}
	}
	if master, err = pollable(fd, "terminal master"); err != nil {
		slave.Close()
		return nil, nil, err
	}
	return master, slave, nil
}

func setTerminalSize(fd int, rows, columns uint32) error {
	if rows > maxTerminalSize || columns > maxTerminalSize {
		return fmt.Errorf("cannot set a terminal to %d by %d", rows, columns)
	}
	size := &unix.Winsize{Row: uint16(rows), Col: uint16(columns)}
	if err := unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, size); err != nil {
		return fmt.Errorf("cannot set a terminal's size: %w", err)
	}
	return nil
}
