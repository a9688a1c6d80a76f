package guest

import (
	"fmt"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/rawfork"
)

// appArmorExec is the attribute of this thread that says under which profile it executes its next program; found
// from a child's first working directory, as stageProgram is, and not by a name the workload could lead elsewhere.
const appArmorExec = "thread-self/attr/apparmor/exec"

// appArmor has the kernel put the workload under its profile at execve. A kernel without AppArmor, or without the profile,
// refuses.
func (c *confined) appArmor(calls *rawfork.Calls) error {
	if c.AppArmor == "" {
		return nil
	}
	if strings.ContainsAny(c.AppArmor, " \n\x00") {
		return fmt.Errorf("%q is no name of a profile", c.AppArmor)
	}
	file, err := calls.Text(appArmorExec)
	if err != nil {
		return err
	}
	calls.Open("cannot open "+appArmorExec, unix.SYS_OPENAT, rawfork.AtCwd, file, unix.O_WRONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	// Written to anything else the words would be lost, and the workload unconfined (CVE-2019-16884, CVE-2025-52881).
	fs := new([unsafe.Sizeof(unix.Statfs_t{}) / 8]uint64) // its first word is f_type
	calls.Use("cannot examine "+appArmorExec, unix.SYS_FSTATFS, 0, rawfork.Address(calls, fs))
	calls.Equal(appArmorExec+" does not lie on a procfs", &fs[0], ^uint64(0), unix.PROC_SUPER_MAGIC)
	wish := []byte("exec " + c.AppArmor)
	calls.Use("profile "+c.AppArmor, unix.SYS_WRITE, 0, rawfork.Address(calls, &wish[0]), uintptr(len(wish)))
	return nil
}
