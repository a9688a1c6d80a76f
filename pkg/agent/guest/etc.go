package guest

import (
	"errors"
	"fmt"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// writeEtc writes the files that say who the sandbox is and whom it can reach. They go into the writable layer and replace
// what the image has by these names: names and addresses of the machine it was built on.
func (r *rootfs) writeEtc() error {
	name := r.config.Hostname
	for _, f := range []struct{ path, content string }{
		{"/etc/hostname", name + "\n"},
		{"/etc/hosts", r.network.hosts(name)},
		{"/etc/resolv.conf", r.network.resolvConf()},
	} {
		if err := r.writeFile(f.path, f.content); err != nil {
			return fmt.Errorf("%s: %w", f.path, err)
		}
	}
	return nil
}

// writeFile replaces name, a link included, by a file made anew: an image's file may be a hard link, a FIFO or lead
// elsewhere.
func (r *rootfs) writeFile(name, content string) error {
	dir, err := makeDirIn(r.dir, path.Dir(name), 0o755, 0)
	if err != nil {
		return err
	}
	defer dir.Close()
	base := path.Base(name)
	if err := unix.Unlinkat(int(dir.Fd()), base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("cannot replace it: %w", err)
	}
	fd, err := unix.Openat(int(dir.Fd()), base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o644)
	if err != nil {
		return fmt.Errorf("cannot make it: %w", err)
	}
	f := os.NewFile(uintptr(fd), name)
	_, err = f.WriteString(content)
	return errors.Join(err, f.Close())
}
