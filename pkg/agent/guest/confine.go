package guest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/agent/v1"
	"github.com/sandboxd/sandboxd/pkg/rawfork"
	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// confined is a process as it shall run: everything decided by the daemon but the user, which only the image's own files
// can say.
type confined struct {
	Args []string
	Env  []string
	Cwd  string
	User userSpec
	// Whether descriptor 0 is a terminal that becomes the controlling one.
	Terminal        bool
	Umask           uint32
	Rlimits         []rlimit
	Caps            capSets
	NoNewPrivileges bool
	// struct sock_filter[]; empty for none.
	Seccomp []byte
	// The name of a profile that the host's kernel has loaded; empty for none.
	AppArmor string

	stdio [3]*os.File // what become descriptors 0 to 2
	who   identity    // set by the step that finds the user
}

// confinement is what happens between the agent's fork and the workload's first instruction, in this order. Each step adds to
// the system calls that the child makes, the only thing that it can do (rawfork.Calls); what it looks up in files is looked up by
// the agent, just before the fork. Every step is fatal: the workload runs confined as asked or not at all. User namespaces,
// cgroups and the root belong to the sandbox, not to the process.
var confinement = []struct {
	name   string
	reason agentv1.ExecFailure_Reason
	plan   func(*confined, *rawfork.Calls) error
	why    string
}{
	{"take the streams", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).streams,
		"descriptors 0 to 2, without close-on-exec"},
	{"have all other descriptors closed", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).closeOthers,
		"by execve, in which the agent's are still needed: to report (CVE-2024-21626)"},
	{"start a session", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).session,
		"signals of a terminal reach this process's descendants only"},
	{"ask for the AppArmor profile", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).appArmor,
		"taken on at execve; before the working directory is left, from where the agent's own proc is reached"},
	{"find the user", agentv1.ExecFailure_REASON_BAD_USER, (*confined).resolve,
		"in the image's own files, with the right to read all of them"},
	{"take the terminal", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).own,
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
		"what the daemon ignored must not stay ignored, nor blocked what the fork blocked, nor timers late"},
	{"forbid new privileges", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).noNewPrivileges,
		"without it an unprivileged process may not install a filter"},
	{"install the system call filter", agentv1.ExecFailure_REASON_CONFINEMENT, (*confined).filter,
		"last, so that it need not allow what the steps before do"},
}

// childReady is what a child writes when everything before its last step succeeded. The pipe closes on execve, so for the
// agent this byte and then the end of the stream mean that the workload runs; the byte and then a report, or a report alone,
// that it does not; and nothing at all that the child died.
const childReady = 'R'

// plan are the calls that confine a child and turn it into the workload.
func (c *confined) plan(status uintptr) (*rawfork.Calls, *stageFailure) {
	calls := &rawfork.Calls{}
	for i, step := range confinement {
		if weaken.WithoutIn(c.Env, step.name) {
			continue
		}
		from := calls.Len()
		if err := step.plan(c, calls); err != nil {
			var own *stageFailure
			if errors.As(err, &own) {
				return nil, own
			}
			return nil, &stageFailure{step.reason, fmt.Sprintf("cannot %s: %v", step.name, err)}
		}
		calls.Mark(from, i)
	}
	ready := []byte{childReady}
	calls.Must("", unix.SYS_WRITE, status, rawfork.Address(calls, &ready[0]), 1).Step = reportStep
	if err := c.execute(calls); err != nil {
		return nil, &stageFailure{agentv1.ExecFailure_REASON_NOT_FOUND, err.Error()}
	}
	return calls, nil
}

// Beyond the steps of confinement.
const (
	reportStep  = -1
	executeStep = -2
)

// failure explains the call that failed.
func (c *confined) failure(call *rawfork.Call, errno unix.Errno) *stageFailure {
	switch call.Step {
	case executeStep:
		if errno == unix.ENOTDIR && !c.named() {
			errno = unix.ENOENT
		}
		return execFailure(c.Args[0], errno, c.missing())
	case reportStep:
		return &stageFailure{agentv1.ExecFailure_REASON_CONFINEMENT, fmt.Sprintf("cannot report to the agent: %v", errno)}
	}
	step := confinement[call.Step]
	why := call.What
	if !call.Compares() {
		if why != "" {
			why += ": "
		}
		why += errno.Error()
	}
	return &stageFailure{step.reason, fmt.Sprintf("cannot %s: %s", step.name, why)}
}

func (c *confined) streams(calls *rawfork.Calls) error {
	for i, f := range c.stdio {
		from := f.Fd()
		if from < uintptr(len(c.stdio)) { // Go's runtime fills these at the start of every program
			return fmt.Errorf("descriptor %d is in the way", from)
		}
		calls.Must(fmt.Sprintf("descriptor %d", i), unix.SYS_DUP3, from, uintptr(i), 0)
	}
	return nil
}

func (c *confined) closeOthers(calls *rawfork.Calls) error {
	if weaken.WithoutIn(c.Env, "close inherited descriptors") {
		// A descriptor of something outside the root, as runc once left one.
		here, err := calls.Text(".")
		calls.Must("", unix.SYS_OPENAT, rawfork.AtCwd, here, unix.O_PATH)
		return err
	}
	calls.Must("", unix.SYS_CLOSE_RANGE, uintptr(len(c.stdio)), uintptr(^uint32(0)), unix.CLOSE_RANGE_CLOEXEC)
	return nil
}

func (c *confined) session(calls *rawfork.Calls) error {
	calls.Must("", unix.SYS_SETSID)
	return nil
}

func (c *confined) resolve(*rawfork.Calls) (err error) {
	c.who, err = c.User.resolve()
	if err != nil {
		return err
	}
	for _, e := range c.Env {
		if strings.HasPrefix(e, "HOME=") {
			return nil
		}
	}
	c.Env = append(slices.Clip(c.Env), "HOME="+c.who.home)
	return nil
}

func (c *confined) own(calls *rawfork.Calls) error {
	for i, f := range c.stdio {
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return fmt.Errorf("descriptor %d: %w", i, err)
		}
		// Pipes and the terminal are this process's own; /dev/null is everybody's.
		if st.Mode&unix.S_IFMT != unix.S_IFIFO && !c.Terminal {
			continue
		}
		err := unix.Fchown(int(f.Fd()), int(c.who.uid), -1)
		if errors.Is(err, unix.EINVAL) {
			return &stageFailure{agentv1.ExecFailure_REASON_BAD_USER,
				fmt.Sprintf("cannot become user %d: the sandbox's range of users ends before it", c.who.uid)}
		}
		if err != nil {
			return fmt.Errorf("cannot give descriptor %d to the user: %w", i, err)
		}
	}
	if c.Terminal {
		calls.Must("", unix.SYS_IOCTL, 0, unix.TIOCSCTTY, 0)
	}
	return nil
}

func (c *confined) workdir(calls *rawfork.Calls) error {
	dir, err := calls.Text(c.Cwd)
	if err != nil {
		return err
	}
	calls.Must(c.Cwd, unix.SYS_CHDIR, dir)
	// The kernel says "(unreachable)/…" for a directory outside the root.
	cwd := new([unix.PathMax / 8]uint64)
	calls.Must(c.Cwd, unix.SYS_GETCWD, rawfork.Address(calls, cwd), unix.PathMax)
	if !weaken.WithoutIn(c.Env, "check the working directory") {
		slash, mask := firstByte('/'), firstByte(0xff)
		calls.Equal(c.Cwd+" is outside the root", &cwd[0], mask, slash)
	}
	return nil
}

// firstByte is a word whose first byte in memory is b, all others 0.
func firstByte(b byte) uint64 { return binary.NativeEndian.Uint64([]byte{b, 7: 0}) }

func (c *confined) limits(calls *rawfork.Calls) error {
	for _, l := range c.Rlimits {
		calls.Must(fmt.Sprintf("resource %d to %d, hard %d", l.Resource, l.Soft, l.Hard),
			unix.SYS_PRLIMIT64, 0, uintptr(l.Resource), rawfork.Address(calls, &unix.Rlimit{Cur: l.Soft, Max: l.Hard}), 0)
	}
	return nil
}

func (c *confined) bound(calls *rawfork.Calls) error {
	c.Caps.bound(calls)
	return nil
}

func (c *confined) identify(calls *rawfork.Calls) error {
	calls.Must("cannot keep capabilities", unix.SYS_PRCTL, unix.PR_SET_KEEPCAPS, 1, 0, 0, 0)
	groups := slices.Clone(c.who.groups) // at least the user's own
	calls.Must(fmt.Sprintf("cannot set groups %v", groups), unix.SYS_SETGROUPS, uintptr(len(groups)), rawfork.Address(calls, &groups[0]))
	gid, uid := uintptr(c.who.gid), uintptr(c.who.uid)
	calls.Must(fmt.Sprintf("cannot set group %d", gid), unix.SYS_SETRESGID, gid, gid, gid)
	calls.Must(fmt.Sprintf("cannot set user %d", uid), unix.SYS_SETRESUID, uid, uid, uid)
	return nil
}

// staysRoot reports whether the process's user and group are the agent's own, so that becoming them changes nothing.
func (c *confined) staysRoot() bool { return c.who.uid == 0 && c.who.gid == 0 }

func (c *confined) capabilities(calls *rawfork.Calls) error {
	c.Caps.apply(calls)
	return nil
}

func (c *confined) mask(calls *rawfork.Calls) error {
	calls.Must("", unix.SYS_UMASK, uintptr(c.Umask))
	return nil
}

func (c *confined) signals(calls *rawfork.Calls) error {
	calls.ResetSignals()
	// The agent's timers may run late, to save processor time: agentTimerSlack in pkg/runtime/container.
	calls.Must("timer slack", unix.SYS_PRCTL, unix.PR_SET_TIMERSLACK, defaultTimerSlack, 0, 0, 0)
	return nil
}

// defaultTimerSlack is the kernel's for a process that never asked, in nanoseconds.
const defaultTimerSlack = 50_000

func (c *confined) noNewPrivileges(calls *rawfork.Calls) error {
	if c.NoNewPrivileges {
		calls.Must("", unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
	}
	return nil
}

func (c *confined) filter(calls *rawfork.Calls) error {
	if len(c.Seccomp) == 0 {
		return nil
	}
	if !c.NoNewPrivileges {
		return errors.New("a filter needs no_new_privs")
	}
	program, err := newFilter(c.Seccomp)
	if err != nil {
		return err
	}
	calls.Must("", unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, 0, rawfork.Address(calls, program))
	return nil
}
