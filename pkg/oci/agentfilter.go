package oci

import (
	"errors"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// agentCall is a row of what a sandbox's agent asks of the kernel once the container stands.
type agentCall struct {
	names []string
	args  []specs.LinuxSeccompArg
	// Only where the agent has a guest kernel to itself.
	guest  bool
	reason string
}

// newNamespaces are clone(2)'s flags for namespaces: CLONE_NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET.
const newNamespaces = 0x7e020000

// agentCalls are what the agent, its children before they are the workload, and its stages (which copy) are written to call, and what TestAgentWorksUnderANarrowProfile shows to be enough for starts, execs, terminals, copies both ways,
// signals and shutdown. They inherit the agent's filter, so what they do is here too.
var agentCalls = []agentCall{
	{names: []string{"mmap", "munmap", "mprotect", "madvise", "mincore", "brk", "futex", "sched_yield", "sched_getaffinity", "nanosleep", "clock_nanosleep",
		"clock_gettime", "getpid", "gettid", "tgkill", "rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "restart_syscall", "arch_prctl",
		"getrandom", "uname", "exit", "exit_group", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "eventfd2", "set_tid_address", "set_robust_list", "rseq"},
		reason: "Go's memory, threads, signals and poller"},
	{names: []string{"clone"}, args: []specs.LinuxSeccompArg{{Index: 0, Value: newNamespaces, ValueTwo: 0, Op: specs.OpMaskedEqual}},
		reason: "threads, and children; never a namespace"},
	{names: []string{"clone3"}, guest: true, reason: "a child in the workload's cgroup from its first instruction; no filter can see its flags"},
	{names: []string{"read", "write", "readv", "writev", "pread64", "pwrite64", "lseek", "close", "fcntl", "fstat", "newfstatat", "statx", "fstatfs", "openat", "openat2", "getdents64",
		"readlinkat", "readlink", "pipe2", "dup3", "memfd_create", "ioctl", "ftruncate", "fallocate"},
		reason: "streams, terminals, /proc, orders for stages"},
	{names: []string{"accept4", "getsockname", "getpeername", "getsockopt", "setsockopt", "shutdown", "recvmsg", "sendmsg", "recvfrom", "sendto"},
		reason: "the daemon's connections"},
	{names: []string{"socket"}, args: []specs.LinuxSeccompArg{{Index: 0, Value: unix.AF_VSOCK, Op: specs.OpEqualTo}}, guest: true,
		reason: "a guest's agent dials the daemon"},
	{names: []string{"connect", "bind"}, guest: true, reason: "the same"},
	{names: []string{"execve", "wait4", "waitid", "kill"}, reason: "children, stages, and every process of the sandbox"},
	{names: []string{"setsid", "chdir", "fchdir", "getcwd", "prlimit64", "prctl", "setgroups", "setresgid", "setresuid", "capget", "capset", "umask", "seccomp", "close_range"},
		reason: "a child's confinement"},
	{names: []string{"mkdirat", "mknodat", "linkat", "symlinkat", "unlinkat", "renameat", "renameat2", "fchmod", "fchmodat", "fchown", "fchownat", "utimensat",
		"getxattr", "lgetxattr", "fgetxattr", "listxattr", "llistxattr", "flistxattr", "setxattr", "lsetxattr", "fsetxattr",
		"copy_file_range", "splice", "sendfile"},
		reason: "a stage's copy, in and out"},
	{names: []string{"clock_settime", "clock_adjtime", "adjtimex", "sethostname"}, guest: true,
		reason: "a guest that goes on from a snapshot: its time and its name"},
	{names: []string{"sync", "fspick", "fsconfig", "reboot"}, guest: true, reason: "the end of a guest: its drive settled, its machine off"},
}

// CompileAgentSeccomp makes the filter of a sandbox's agent: what the workload's own profile allows, and agentCalls. A filter is
// inherited, so the agent's must allow whatever the workload's does; so whoever takes the agent over gains, behind the default
// profile, what agentCalls has for guests, and in a container nothing. It is nil for a workload without a filter.
func CompileAgentSeccomp(profile *specs.LinuxSeccomp, granted spec.Isolation) ([]byte, error) {
	if profile == nil {
		return nil, nil
	}
	if granted != spec.IsolationContainer && granted != spec.IsolationVM {
		return nil, errors.New("cannot compile the agent's seccomp filter: the isolation is not decided")
	}
	own := *profile
	own.Syscalls = nil
	for _, c := range agentCalls {
		if !c.guest || granted == spec.IsolationVM {
			own.Syscalls = append(own.Syscalls, specs.LinuxSyscall{Names: c.names, Action: specs.ActAllow, Args: c.args})
		}
	}
	for _, s := range profile.Syscalls {
		s.Action, s.ErrnoRet = spareAgent(s.Action, s.ErrnoRet)
		s.Names = slices.Clone(s.Names)
		own.Syscalls = append(own.Syscalls, s)
	}
	own.DefaultAction, own.DefaultErrnoRet = spareAgent(profile.DefaultAction, profile.DefaultErrnoRet)
	return CompileSeccomp(&own)
}

// spareAgent has a call fail that would end the process: the workload's own filter, which holds besides, still ends it there.
func spareAgent(action specs.LinuxSeccompAction, errno *uint) (specs.LinuxSeccompAction, *uint) {
	switch action {
	case specs.ActKill, specs.ActKillThread, specs.ActKillProcess, specs.ActTrap:
		return specs.ActErrno, nil
	default:
		return action, errno
	}
}
