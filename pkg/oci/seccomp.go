package oci

//go:generate go run ./internal/gensyscalls syscalls_amd64.go

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// Offsets into struct seccomp_data (linux/seccomp.h), which a filter reads 32 bits at a time. Arguments are 64 bits in
// the machine's byte order, and amd64 is little-endian.
const (
	dataNr     = 0
	dataArch   = 4
	dataArgs   = 16
	argSize    = 8
	argHigh    = 4
	maxArgs    = 6
	maxErrno   = 4095
	x32Bit     = 0x40000000 // __X32_SYSCALL_BIT of asm/unistd.h
	retErrno   = unix.SECCOMP_RET_ERRNO
	retNoSys   = retErrno | uint32(unix.ENOSYS)
	badArchRet = unix.SECCOMP_RET_KILL_PROCESS
)

// CompileSeccomp turns a profile into the classic BPF program the kernel runs before every system call: struct
// sock_filter[] for amd64, at most 4096 instructions.
//
// What a profile means is:
//   - A call of another architecture's ABI (i386) kills the process. A call of the x32 ABI answers ENOSYS.
//   - The rules that name a system call are tried in order; the first whose conditions all hold decides. The conditions
//     of one rule must be about different arguments, for runtimes differ on what a repeated one means.
//   - A call no rule decides gets the default action. But if that is to fail, a call newer than every one the profile
//     names fails with ENOSYS instead: programs that probe for a new call then fall back, as they do under runc.
//   - A name this table does not know is left out where it would allow, and is an error where it would refuse.
//
// Nobody may change the answer: it is kept for the next who asks.
func CompileSeccomp(profile *specs.LinuxSeccomp) ([]byte, error) {
	if profile == nil {
		return nil, nil
	}
	return kept.get(profile, compileSeccomp)
}

func compileSeccomp(profile *specs.LinuxSeccomp) ([]byte, error) {
	if err := checkProfile(profile); err != nil {
		return nil, fmt.Errorf("cannot compile seccomp profile: %w", err)
	}
	rules, fallback, err := rulesOf(profile)
	if err != nil {
		return nil, fmt.Errorf("cannot compile seccomp profile: %w", err)
	}
	var p program
	p.check(rules, fallback)
	out, err := p.assemble()
	if err != nil {
		return nil, fmt.Errorf("cannot compile seccomp profile: %w", err)
	}
	return out, nil
}

// checkProfile refuses what a compiled filter cannot carry.
func checkProfile(profile *specs.LinuxSeccomp) error {
	for _, a := range profile.Architectures {
		if a != specs.ArchX86_64 {
			return fmt.Errorf("architecture %s is not supported, only %s", a, specs.ArchX86_64)
		}
	}
	if len(profile.Flags) > 0 {
		return fmt.Errorf("flags %v are not supported", profile.Flags)
	}
	if profile.ListenerPath != "" {
		return errors.New("a listener is not supported")
	}
	return nil
}

// rule is what happens to a system call when every condition holds.
type rule struct {
	conditions []specs.LinuxSeccompArg
	ret        uint32
}

// segment is a run of system call numbers, from first to the next segment's, that are treated alike.
type segment struct {
	first uint32
	rules []rule
	// What the call gets when no rule decides.
	fallback uint32
}

// unconditional reports whether s is one action whatever the arguments.
func (s segment) unconditional() bool { return len(s.rules) == 0 }

// rulesOf collects the profile's rules by number, and the default action.
func rulesOf(profile *specs.LinuxSeccomp) (rules map[uint32][]rule, fallback uint32, err error) {
	fallback, err = returnValue(profile.DefaultAction, profile.DefaultErrnoRet)
	if err != nil {
		return nil, 0, fmt.Errorf("default action: %w", err)
	}
	rules = map[uint32][]rule{}
	for _, s := range profile.Syscalls {
		ret, err := returnValue(s.Action, s.ErrnoRet)
		if err != nil {
			return nil, 0, fmt.Errorf("rule for %v: %w", s.Names, err)
		}
		if err := checkConditions(s.Args); err != nil {
			return nil, 0, fmt.Errorf("rule for %v: %w", s.Names, err)
		}
		for _, name := range s.Names {
			nr, known := syscallNumbers[name]
			switch {
			case known:
				rules[nr] = append(rules[nr], rule{s.Args, ret})
			case ret != unix.SECCOMP_RET_ALLOW && ret != unix.SECCOMP_RET_LOG:
				return nil, 0, fmt.Errorf("system call %q is unknown", name)
			}
		}
	}
	return rules, fallback, nil
}

func checkConditions(args []specs.LinuxSeccompArg) error {
	var seen [maxArgs]bool
	for _, a := range args {
		if a.Index >= maxArgs {
			return fmt.Errorf("argument %d: a system call has %d", a.Index, maxArgs)
		}
		if seen[a.Index] {
			return fmt.Errorf("argument %d has two conditions", a.Index)
		}
		seen[a.Index] = true
	}
	return nil
}

// returnValue is what a filter returns for an action. Without an errno, errno actions fail with EPERM.
func returnValue(action specs.LinuxSeccompAction, errno *uint) (uint32, error) {
	if errno != nil && action != specs.ActErrno {
		return 0, fmt.Errorf("%s carries no error number", action)
	}
	switch action {
	case specs.ActAllow:
		return unix.SECCOMP_RET_ALLOW, nil
	case specs.ActLog:
		return unix.SECCOMP_RET_LOG, nil
	case specs.ActTrap:
		return unix.SECCOMP_RET_TRAP, nil
	case specs.ActKill, specs.ActKillThread:
		return unix.SECCOMP_RET_KILL_THREAD, nil
	case specs.ActKillProcess:
		return unix.SECCOMP_RET_KILL_PROCESS, nil
	case specs.ActErrno:
		if errno == nil {
			return retErrno | uint32(unix.EPERM), nil
		}
		if *errno > maxErrno {
			return 0, fmt.Errorf("error number %d is above %d", *errno, maxErrno)
		}
		return retErrno | uint32(*errno), nil
	default:
		// SCMP_ACT_TRACE and SCMP_ACT_NOTIFY need a second process to decide.
		return 0, fmt.Errorf("action %q is not supported", action)
	}
}

// segmentsOf divides all numbers below the x32 bit.
func segmentsOf(rules map[uint32][]rule, fallback uint32) []segment {
	var out []segment
	add := func(s segment) {
		if n := len(out); n > 0 && s.unconditional() && out[n-1].unconditional() && out[n-1].fallback == s.fallback {
			return // more of the same
		}
		out = append(out, s)
	}
	next := uint32(0)
	for _, nr := range slices.Sorted(maps.Keys(rules)) {
		if nr > next {
			add(segment{first: next, fallback: fallback})
		}
		s := segment{first: nr, fallback: fallback}
		for _, r := range rules[nr] {
			if len(r.conditions) == 0 {
				s.fallback = r.ret // decides always: later rules are never reached
				break
			}
			s.rules = append(s.rules, r)
		}
		add(s)
		next = nr + 1
	}
	if isErrno := fallback&unix.SECCOMP_RET_ACTION_FULL == retErrno; isErrno && next > 0 {
		fallback = retNoSys
	}
	add(segment{first: next, fallback: fallback})
	return out
}
