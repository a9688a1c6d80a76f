package server

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	goruntime "runtime"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// diskLow is the free space below which doctor warns: a pull of a common image and a few writable layers.
	diskLow = 2 << 30
	// diskOut is the free space below which nothing can be expected to work.
	diskOut = 128 << 20
	// socketMode is the mode of the daemon's socket: its group may call, others may not.
	socketMode = 0o660
)

// ownChecks are the daemon's own; the runtimes bring theirs.
func (s *Server) ownChecks() []runtime.Check {
	checks := []runtime.Check{s.checkVersion(), checkRoot(), s.checkCgroup(), checkSocket(s.Host.Socket), s.checkPolicy()}
	checks = append(checks,
		checkDir("state directory", s.Host.StateDir, 0o077),
		// The socket's users pass through it; what lies below is 0700.
		checkDir("run directory", s.Host.RunDir, 0o022),
	)
	if s.NetworkChecks != nil {
		checks = append(checks, s.NetworkChecks()...)
	}
	return append(checks, checkSpace("disk space", s.Host.StateDir))
}

func (s *Server) checkVersion() runtime.Check {
	kernel, err := kernelRelease()
	if err != nil {
		return failed("version", err, "look at the kernel's log")
	}
	return ok("version", fmt.Sprintf("sandboxd %s (%s), agent protocol %d, kernel %s on %s",
		s.Host.Version, goruntime.Version(), spec.ProtocolVersion, kernel, goruntime.GOARCH))
}

func checkRoot() runtime.Check {
	if os.Geteuid() != 0 {
		return runtime.Check{Name: "privileges", Result: "failed", Finding: "sandboxd does not run as root",
			Advice: "start sandboxd as root: it makes mounts, cgroups and namespaces for other users"}
	}
	return ok("privileges", "sandboxd runs as root")
}

func (s *Server) checkCgroup() runtime.Check {
	const name = "cgroups"
	switch s.Host.CgroupMode {
	case "v2":
		return ok(name, "cgroup v2 limits cpu, memory and processes")
	case "v1", "hybrid":
		return runtime.Check{Name: name, Result: "warning", Finding: "cgroup " + s.Host.CgroupMode + ": limits work through the v1 controllers",
			Advice: "boot the host with cgroup v2 alone (systemd.unified_cgroup_hierarchy=1): limits are stricter and a group is killed at once"}
	}
	return runtime.Check{Name: name, Result: "failed", Finding: "no cgroup controllers were found under /sys/fs/cgroup",
		Advice: "mount cgroup2 on /sys/fs/cgroup with the controllers cpu, memory and pids"}
}

func checkSocket(path string) runtime.Check {
	const name = "socket"
	info, err := os.Lstat(path)
	switch {
	case err != nil:
		return failed(name, err, "restart sandboxd, which makes its socket anew")
	case info.Mode().Type() != fs.ModeSocket:
		return failed(name, fmt.Errorf("%s is no socket", path), "restart sandboxd, which makes its socket anew")
	case info.Mode().Perm()&^socketMode != 0:
		return runtime.Check{Name: name, Result: "failed",
			Finding: fmt.Sprintf("%s has mode %04o: others than root and its group may call sandboxd", path, info.Mode().Perm()),
			Advice:  fmt.Sprintf("run chmod %04o %s", socketMode, path)}
	}
	return ok(name, fmt.Sprintf("%s has mode %04o", path, info.Mode().Perm()))
}

func (s *Server) checkPolicy() runtime.Check {
	const name = "policy"
	if s.Host.PolicyFile == "" {
		return runtime.Check{Name: name, Result: "warning",
			Finding: "no policy file: callers choose the isolation, and get a vm when they do not",
			Advice:  "start sandboxd with --policy FILE to decide it for them"}
	}
	return ok(name, fmt.Sprintf("%s: %d rules, otherwise %s (%s)", s.Host.PolicyFile, len(s.Policy.Rules()), s.Policy.Default(), s.Policy.Digest()))
}

// checkDir makes and removes a file, the only proof that holds for read-only mounts and quotas too, and looks whether
// others have permissions they must not have.
func checkDir(name, path string, forbidden fs.FileMode) runtime.Check {
	if err := makeFile(path); err != nil {
		return failed(name, err, "make "+path+" writable for root")
	}
	info, err := os.Stat(path)
	if err != nil {
		return failed(name, err, "make "+path+" again and restart sandboxd")
	}
	if bad := info.Mode().Perm() & forbidden; bad != 0 {
		return runtime.Check{Name: name, Result: "failed", Finding: fmt.Sprintf("%s has mode %04o: others can do there what only root should", path, info.Mode().Perm()),
			Advice: fmt.Sprintf("run chmod %04o %s", info.Mode().Perm()&^forbidden, path)}
	}
	return ok(name, path+" is writable")
}

// makeFile makes a file in dir that has no name, so that it is gone however this ends. Where the file system knows no such
// files (overlayfs before 6.3) it has one for an instant.
func makeFile(dir string) error {
	fd, err := unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == nil {
		return unix.Close(fd)
	}
	if !errors.Is(err, unix.EOPNOTSUPP) && !errors.Is(err, unix.EISDIR) {
		return fmt.Errorf("cannot make a file in %s: %w", dir, err)
	}
	f, err := os.CreateTemp(dir, ".doctor-*")
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

func checkSpace(name, path string) runtime.Check {
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return failed(name, fmt.Errorf("cannot read the free space of %s: %w", path, err), "look at the kernel's log: its disk may be failing")
	}
	free := st.Bavail * uint64(st.Bsize)
	c := ok(name, fmt.Sprintf("%.1f GiB free in %s", float64(free)/(1<<30), path))
	switch advice := "free some space: sandboxctl image ls and sandboxctl ps -a show what can go"; {
	case free < diskOut:
		c.Result, c.Advice = "failed", advice
	case free < diskLow:
		c.Result, c.Advice = "warning", advice
	}
	return c
}

func ok(name, finding string) runtime.Check {
	return runtime.Check{Name: name, Result: "ok", Finding: finding}
}

func failed(name string, err error, advice string) runtime.Check {
	return runtime.Check{Name: name, Result: "failed", Finding: err.Error(), Advice: advice}
}
