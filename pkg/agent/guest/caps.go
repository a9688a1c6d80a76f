package guest

import (
	"fmt"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/rawfork"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// capSets are a process's capability sets, bit n for capability n.
type capSets struct {
	Bounding    uint64 `json:"bounding"`
	Permitted   uint64 `json:"permitted"`
	Effective   uint64 `json:"effective"`
	Inheritable uint64 `json:"inheritable"`
	Ambient     uint64 `json:"ambient"`
}

func capMask(names []string) (uint64, error) {
	var mask uint64
	for _, name := range names {
		n := slices.Index(spec.Capabilities, name)
		if n < 0 {
			return 0, fmt.Errorf("capability %q is unknown", name)
		}
		mask |= 1 << n
	}
	return mask, nil
}

// newCapSets reads the capabilities of an OCI process. None given means none.
func newCapSets(c *specs.LinuxCapabilities) (capSets, error) {
	var s capSets
	if c == nil {
		return s, nil
	}
	for _, set := range []struct {
		mask  *uint64
		names []string
	}{
		{&s.Bounding, c.Bounding}, {&s.Permitted, c.Permitted}, {&s.Effective, c.Effective},
		{&s.Inheritable, c.Inheritable}, {&s.Ambient, c.Ambient},
	} {
		mask, err := capMask(set.names)
		if err != nil {
			return capSets{}, err
		}
		*set.mask = mask
	}
	return s, nil
}

// lastCap is beyond every kernel's last capability: a set has 64 bits.
const lastCap = 63

// bound takes every capability out of the child's bounding set that the set does not have.
func (s capSets) bound(calls *rawfork.Calls) {
	for n := range lastCap + 1 {
		if s.Bounding&(1<<n) != 0 {
			continue
		}
		call := calls.Must(fmt.Sprintf("cannot drop capability %d", n), unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(n), 0, 0, 0)
		if n > unix.CAP_LAST_CAP {
			call.Pass = unix.EINVAL // this kernel may have fewer
		}
	}
}

// apply gives the child exactly these sets.
func (s capSets) apply(calls *rawfork.Calls) {
	header := &unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := &[2]unix.CapUserData{
		{Effective: uint32(s.Effective), Permitted: uint32(s.Permitted), Inheritable: uint32(s.Inheritable)},
		{Effective: uint32(s.Effective >> 32), Permitted: uint32(s.Permitted >> 32), Inheritable: uint32(s.Inheritable >> 32)},
	}
	calls.Must("", unix.SYS_CAPSET, rawfork.Address(calls, header), rawfork.Address(calls, data))
	calls.Must("cannot clear the ambient set", unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
	for n := range lastCap + 1 {
		if s.Ambient&(1<<n) != 0 {
			calls.Must(fmt.Sprintf("cannot raise ambient capability %d", n), unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(n), 0, 0)
		}
	}
}
