package guest

import (
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

// appArmorExec is the attribute of this thread that says under which profile it executes its next program; found
// from a stage's first working directory, as stageProgram is, and not by a name the workload could lead elsewhere.
const appArmorExec = "thread-self/attr/apparmor/exec"

// appArmor has the kernel put the workload under its profile at execve. A kernel without AppArmor, or without the profile,
// refuses.
func (c *confined) appArmor() error {
	if c.AppArmor == "" {
		return nil
	}
	if strings.ContainsAny(c.AppArmor, " \n\x00") {
		return fmt.Errorf("%q is no name of a profile", c.AppArmor)
	}
	fd, err := unix.Open(appArmorExec, unix.O_WRONLY|unix.O_CLOEXEC|unix.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("cannot open %s: %w", appArmorExec, err)
	}
	f := os.NewFile(uintptr(fd), appArmorExec)
	defer f.Close()
	// Written to anything else the words would be lost, and the workload unconfined (CVE-2019-16884, CVE-2025-52881).
	if err := checkFilesystem(f, unix.PROC_SUPER_MAGIC); err != nil {
		return err
	}
	if err := writeOnce(f, "exec "+c.AppArmor); err != nil {
		return fmt.Errorf("profile %s: %w", c.AppArmor, err)
	}
	return nil
}
