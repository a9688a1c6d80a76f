package oci

import (
	"fmt"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Descriptors a process may have open unless asked otherwise. A soft limit of 1024 because select(2) overruns its
// buffer beyond, and because old programs close every possible descriptor at start; the hard limit is systemd's, for
// programs that know better and raise the soft one.
const (
	defaultNofileSoft = 1024
	defaultNofileHard = 524288
)

var rlimitNumbers = map[string]int{
	"RLIMIT_AS":         unix.RLIMIT_AS,
	"RLIMIT_CORE":       unix.RLIMIT_CORE,
	"RLIMIT_CPU":        unix.RLIMIT_CPU,
	"RLIMIT_DATA":       unix.RLIMIT_DATA,
	"RLIMIT_FSIZE":      unix.RLIMIT_FSIZE,
	"RLIMIT_LOCKS":      unix.RLIMIT_LOCKS,
	"RLIMIT_MEMLOCK":    unix.RLIMIT_MEMLOCK,
	"RLIMIT_MSGQUEUE":   unix.RLIMIT_MSGQUEUE,
	"RLIMIT_NICE":       unix.RLIMIT_NICE,
	"RLIMIT_NOFILE":     unix.RLIMIT_NOFILE,
	"RLIMIT_NPROC":      unix.RLIMIT_NPROC,
	"RLIMIT_RSS":        unix.RLIMIT_RSS,
	"RLIMIT_RTPRIO":     unix.RLIMIT_RTPRIO,
	"RLIMIT_RTTIME":     unix.RLIMIT_RTTIME,
	"RLIMIT_SIGPENDING": unix.RLIMIT_SIGPENDING,
	"RLIMIT_STACK":      unix.RLIMIT_STACK,
}

// CanonicalRlimit gives the full name of a resource limit: RLIMIT_NOFILE for nofile.
func CanonicalRlimit(name string) (string, error) {
	upper := strings.ToUpper(name)
	if !strings.HasPrefix(upper, "RLIMIT_") {
		upper = "RLIMIT_" + upper
	}
	if _, known := rlimitNumbers[upper]; !known {
		return "", spec.Errorf(spec.KindInvalid, "resource limit %q is unknown; see getrlimit(2) for the names", name)
	}
	return upper, nil
}

// hardLimit is the daemon's own hard limit. A test may stand in for it.
var hardLimit = func(name string) (uint64, error) {
	var l unix.Rlimit
	if err := unix.Getrlimit(rlimitNumbers[name], &l); err != nil {
		return 0, fmt.Errorf("cannot read %s: %w", name, err)
	}
	return l.Max, nil
}

// rlimitsOf is what was asked for, checked, and the default for open files.
//
// A container's agent inherits the daemon's limits and cannot raise a hard one: that takes CAP_SYS_RESOURCE in the
// initial user namespace, which it is not in. A VM's agent has a kernel to itself.
func rlimitsOf(asked []spec.Rlimit, granted spec.Isolation) ([]specs.POSIXRlimit, error) {
	inContainer := granted == spec.IsolationContainer
	out, err := overrideRlimits(nil, asked)
	if err != nil {
		return nil, err
	}
	for _, l := range out {
		if !inContainer {
			break
		}
		own, err := hardLimit(l.Type)
		if err != nil {
			return nil, spec.Errorf(spec.KindInternal, "%w", err)
		}
		if l.Hard > own {
			return nil, &spec.Error{Kind: spec.KindUnsupported, Field: "spec.process.rlimits", Err: fmt.Errorf(
				"a container on this host cannot have a hard %s of %d: sandboxd's own is %d; ask for less, raise the daemon's limit, or use --isolation vm", l.Type, l.Hard, own)}
		}
	}
	if slices.ContainsFunc(out, func(l specs.POSIXRlimit) bool { return l.Type == "RLIMIT_NOFILE" }) {
		return out, nil
	}
	hard := uint64(defaultNofileHard)
	if inContainer {
		own, err := hardLimit("RLIMIT_NOFILE")
		if err != nil {
			return nil, spec.Errorf(spec.KindInternal, "%w", err)
		}
		hard = min(hard, own)
	}
	return append(out, specs.POSIXRlimit{Type: "RLIMIT_NOFILE", Soft: min(defaultNofileSoft, hard), Hard: hard}), nil
}

// overrideRlimits puts over's limits in the place of base's of the same type. It refuses to go beyond base's hard limit:
// an exec gets no more than the workload's own process has.
func overrideRlimits(base []specs.POSIXRlimit, over []spec.Rlimit) ([]specs.POSIXRlimit, error) {
	const field = "spec.process.rlimits"
	out := slices.Clone(base)
	seen := map[string]bool{}
	for _, l := range over {
		name, err := CanonicalRlimit(l.Type)
		if err != nil {
			return nil, spec.Invalidf(field, "%w", err)
		}
		if seen[name] {
			return nil, spec.Invalidf(field, "%s is given twice", name)
		}
		seen[name] = true
		if l.Soft > l.Hard {
			return nil, spec.Invalidf(field, "%s: the soft limit %d is above the hard limit %d", name, l.Soft, l.Hard)
		}
		limit := specs.POSIXRlimit{Type: name, Soft: l.Soft, Hard: l.Hard}
		i := slices.IndexFunc(out, func(o specs.POSIXRlimit) bool { return o.Type == name })
		if i < 0 {
			out = append(out, limit)
			continue
		}
		if limit.Hard > out[i].Hard {
			return nil, spec.Invalidf(field, "%s: the hard limit %d is above the workload's own, %d", name, limit.Hard, out[i].Hard)
		}
		out[i] = limit
	}
	return out, nil
}
