package guest

import (
	"errors"
	"fmt"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// confined is a process as it shall run: everything decided by the daemon but the user, which only the image's own files
// can say.
type confined struct {
	Args []string `json:"args"`
	Env  []string `json:"env"`
	Cwd  string   `json:"cwd"`
	User userSpec `json:"user"`
	// Whether descriptor 0 is a terminal that becomes the controlling one.
	Terminal        bool     `json:"terminal,omitempty"`
	Umask           uint32   `json:"umask"`
	Rlimits         []rlimit `json:"rlimits,omitempty"`
	Caps            capSets  `json:"caps"`
	NoNewPrivileges bool     `json:"noNewPrivileges,omitempty"`
	// struct sock_filter[]; empty for none.
	Seccomp []byte `json:"seccomp,omitempty"`
	// The name of a profile that the host's kernel has loaded; empty for none.
	AppArmor string `json:"appArmor,omitempty"`

	who    identity // set by the step that resolves the user
	status int      // the pipe to the agent
}

// confinement is what happens between the agent's fork and the workload's first instruction, in this order, on the stage's
// only working thread. Every step is fatal: the workload runs confined as asked or not at all. Inherited descriptors
// were marked before, for execve to close (closeOthers), and user namespaces, cgroups and the root belong to the sandbox, not to the process.
var confinement = []struct {
	name   string
	reason agentv1.ExecFailure_Reason
	do     func(*confined) error
	why    string
}{
	{"start a session", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).session,
		"signals of a terminal reach this process's descendants only"},
	{"ask for the AppArmor profile", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).appArmor,
		"taken on at execve; before the working directory is left, from where the agent's own proc is reached"},
	{"find the user", agentv1.ExecFailure_REASON_BAD_USER, (*confined).resolve,
		"while files that only root may read can be read"},
	{"take the terminal", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).standardStreams,
		"needs the session; the user must be able to reopen its own streams, so they become its"},
	{"enter the working directory", agentv1.ExecFailure_REASON_BAD_WORKDIR, (*confined).workdir,
		"as root, as other runtimes do; checked to be inside the root (CVE-2024-21626)"},
	{"set resource limits", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).limits,
		"raising a hard limit needs a capability"},
	{"limit the bounding set", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).bound,
		"needs CAP_SETPCAP"},
	{"become the user", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).identify,
		"needs CAP_SETUID and CAP_SETGID; capabilities are kept across it so that the next step decides on them"},
	{"set capabilities", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).capabilities,
		"from here on no step may need one"},
	{"set the umask", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).mask,
		"the agent's own is 0"},
	{"reset signals", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).signals,
		"what the daemon ignored must not stay ignored"},
	{"forbid new privileges", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).noNewPrivileges,
		"without it an unprivileged process may not install a filter"},
	{"install the system call filter", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).filter,
		"last, so that it need not allow what the steps before do"},
}

// become confines this process and turns it into the workload. It returns only if that failed.
func (c *confined) become(status int) *stageFailure {
	c.status = status
	for _, step := range confinement {
		if weaken.Without(step.name) {
			continue
		}
		if err := step.do(c); err != nil {
			var own *stageFailure
			if errors.As(err, &own) {
				return own
			}
			return &stageFailure{step.reason, fmt.Sprintf("cannot %s: %v", step.name, err)}
		}
	}
	if _, err := unix.Write(status, []byte{stageReady}); err != nil {
		return &stageFailure{agentv1.ExecFailure_REASON_CONFINEMENT, fmt.Sprintf("cannot report to the agent: %v", err)}
	}
	return c.execute()
}

func (c *confined) session() error {
	_, err := unix.Setsid()
	return err
}

func (c *confined) resolve() (err error) {
	c.who, err = c.User.resolve()
	if err != nil {
		return err
	}
	for _, e := range c.Env {
		if strings.HasPrefix(e, "HOME=") {
			return nil
		}
	}
	c.Env = append(c.Env, "HOME="+c.who.home)
	return nil
}

func (c *confined) standardStreams() error {
	for fd := range 3 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return fmt.Errorf("descriptor %d: %w", fd, err)
		}
		// Pipes and the terminal are this process's own; /dev/null is everybody's.
		if st.Mode&unix.S_IFMT != unix.S_IFIFO && !c.Terminal {
			continue
		}
		err := unix.Fchown(fd, int(c.who.uid), -1)
		if errors.Is(err, unix.EINVAL) {
			return &stageFailure{agentv1.ExecFailure_REASON_BAD_USER,
				fmt.Sprintf("cannot become user %d: the sandbox's range of users ends before it", c.who.uid)}
		}
		if err != nil {
			return fmt.Errorf("cannot give descriptor %d to the user: %w", fd, err)
		}
	}
	if !c.Terminal {
		return nil
	}
	return unix.IoctlSetInt(0, unix.TIOCSCTTY, 0)
}

func (c *confined) workdir() error {
	if err := unix.Chdir(c.Cwd); err != nil {
		return fmt.Errorf("%s: %w", c.Cwd, err)
	}
	// The kernel says "(unreachable)/…" for a directory outside the root; Go's own Getwd would believe $PWD.
	buf := make([]byte, unix.PathMax)
	n, err := unix.Getcwd(buf)
	if err != nil {
		return fmt.Errorf("%s: %w", c.Cwd, err)
	}
	if (n < 1 || buf[0] != '/') && !weaken.Without("check the working directory") {
		return fmt.Errorf("%s is outside the root", c.Cwd)
	}
	return nil
}

func (c *confined) limits() error {
	for _, l := range c.Rlimits {
		if err := unix.Prlimit(0, l.Resource, &unix.Rlimit{Cur: l.Soft, Max: l.Hard}, nil); err != nil {
			return fmt.Errorf("resource %d to %d, hard %d: %w", l.Resource, l.Soft, l.Hard, err)
		}
	}
	return nil
}

func (c *confined) bound() error { return limitBounding(c.Caps.Bounding) }

func (c *confined) identify() error {
	if err := unix.Prctl(unix.PR_SET_KEEPCAPS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot keep capabilities: %w", err)
	}
	// Raw, because Go's own wrappers would change every thread of the stage, and this one is the only one that lives on.
	groups := c.who.groups
	var first unsafe.Pointer
	if len(groups) > 0 {
		first = unsafe.Pointer(&groups[0])
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(groups)), uintptr(first), 0); errno != 0 {
		return fmt.Errorf("cannot set groups %v: %w", groups, errno)
	}
	gid, uid := uintptr(c.who.gid), uintptr(c.who.uid)
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESGID, gid, gid, gid); errno != 0 {
		return fmt.Errorf("cannot set group %d: %w", gid, errno)
	}
	if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uid, uid, uid); errno != 0 {
		return fmt.Errorf("cannot set user %d: %w", uid, errno)
	}
	return nil
}

func (c *confined) capabilities() error { return c.Caps.apply() }

func (c *confined) mask() error {
	unix.Umask(int(c.Umask))
	return nil
}

func (c *confined) signals() error { return resetSignals() }

func (c *confined) noNewPrivileges() error {
	if !c.NoNewPrivileges {
		return nil
	}
	return unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
}

func (c *confined) filter() error {
	if len(c.Seccomp) == 0 {
		return nil
	}
	if !c.NoNewPrivileges {
		return errors.New("a filter needs no_new_privs")
	}
	return installFilter(c.Seccomp, 0)
}
