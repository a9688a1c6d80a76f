package guest

import (
	"archive/tar"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// maxXattr is the kernel's own limit for a list of names and for a value.
const maxXattr = 64 << 10

// copiedXattrs are the extended attributes that a copy keeps: a program's or user's own, file capabilities, access lists.
// The others are the kernel's or a security module's and mean something only where they are.
func copiedXattr(name string) bool {
	return strings.HasPrefix(name, "user.") || name == "security.capability" || strings.HasPrefix(name, "system.posix_acl_")
}

func addXattrs(f *os.File, h *tar.Header) error {
	list := make([]byte, maxXattr)
	n, err := unix.Flistxattr(int(f.Fd()), list)
	if errors.Is(err, unix.ENOTSUP) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot list attributes of %s: %w", h.Name, err)
	}
	value := make([]byte, maxXattr)
	for name := range strings.SplitSeq(string(list[:n]), "\x00") {
		if !copiedXattr(name) || strings.Contains(name, "=") {
			continue // PAX can't carry a name with an equals sign
		}
		n, err := unix.Fgetxattr(int(f.Fd()), name, value)
		if errors.Is(err, unix.ENODATA) {
			continue // removed meanwhile
		}
		if err != nil {
			return fmt.Errorf("cannot read attribute %s of %s: %w", name, h.Name, err)
		}
		if h.PAXRecords == nil {
			h.PAXRecords = map[string]string{}
		}
		h.PAXRecords[paxXattr+name] = string(value[:n])
	}
	return nil
}

func setXattrs(f *os.File, h *tar.Header) error {
	for key, value := range h.PAXRecords {
		name, is := strings.CutPrefix(key, paxXattr)
		if !is || !copiedXattr(name) {
			continue
		}
		if err := unix.Fsetxattr(int(f.Fd()), name, []byte(value), 0); err != nil {
			return fmt.Errorf("cannot set attribute %s: %w", name, err)
		}
	}
	return nil
}
