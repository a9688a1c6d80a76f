package microvm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const qmpSocket = "qmp.sock"

// listenUnix binds dir/name and answers with the listening descriptor, for a child. The address goes through the
// directory's descriptor: a path may be longer than the 108 bytes that an address holds.
func listenUnix(dir, name string) (*os.File, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", name, err)
	}
	defer d.Close()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(fdPath(int(d.Fd())), name), Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", filepath.Join(dir, name), err)
	}
	l.SetUnlinkOnClose(false) // the child serves it on
	f, err := l.File()
	if err == nil {
		// Only to duplicate it. File has made it blocking for both, as QEMU expects it.
		err = l.Close()
	} else {
		err = errors.Join(err, l.Close())
	}
	if err != nil {
		return nil, fmt.Errorf("cannot listen on %s: %w", filepath.Join(dir, name), err)
	}
	if err := os.Chmod(filepath.Join(dir, name), 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot listen on %s: %w", name, err), f.Close())
	}
	return f, nil
}

// dialUnix connects to dir/name.
func dialUnix(ctx context.Context, dir, name string) (net.Conn, error) {
	d, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	var dialer net.Dialer
	return dialer.DialContext(ctx, "unix", filepath.Join(fdPath(int(d.Fd())), name))
}
