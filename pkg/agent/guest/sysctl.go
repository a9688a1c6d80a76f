package guest

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// sysctls sets the kernel parameters of the config, all of which are the sandbox's own namespaces' or kernel's: the kernel
// refuses the others.
func (r *rootfs) sysctls() error {
	for key, value := range r.config.Linux.Sysctl {
		name := "sys/" + strings.ReplaceAll(key, ".", "/")
		f, err := openIn(r.result.proc, name, unix.O_WRONLY, unix.RESOLVE_NO_SYMLINKS|unix.RESOLVE_NO_XDEV)
		if err != nil {
			return fmt.Errorf("%s: %w", key, err)
		}
		err = writeOnce(f, value)
		f.Close()
		if err != nil {
			return fmt.Errorf("%s to %q: %w", key, value, err)
		}
	}
	return nil
}

// writeOnce writes in one system call: the kernel takes each write as a whole value.
func writeOnce(f *os.File, value string) error {
	_, err := unix.Write(int(f.Fd()), []byte(value))
	return err
}
