package guest

import (
	"errors"
	"fmt"
	"slices"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

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

// limitBounding takes every capability out of the calling thread's bounding set that keep has not.
func limitBounding(keep uint64) error {
	for n := range 64 {
		if keep&(1<<n) != 0 {
			continue
		}
		err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(n), 0, 0, 0)
		if errors.Is(err, unix.EINVAL) && n > 0 {
			return nil // beyond the kernel's last one
		}
		if err != nil {
			return fmt.Errorf("cannot drop capability %d: %w", n, err)
		}
	}
	return nil
}

// apply gives the calling thread exactly these sets.
func (s capSets) apply() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	data := [2]unix.CapUserData{
		{Effective: uint32(s.Effective), Permitted: uint32(s.Permitted), Inheritable: uint32(s.Inheritable)},
		{Effective: uint32(s.Effective >> 32), Permitted: uint32(s.Permitted >> 32), Inheritable: uint32(s.Inheritable >> 32)},
	}
	if err := unix.Capset(&header, &data[0]); err != nil {
		return err
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return fmt.Errorf("cannot clear the ambient set: %w", err)
	}
	for n := range 64 {
		if s.Ambient&(1<<n) == 0 {
			continue
		}
		if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_RAISE, uintptr(n), 0, 0); err != nil {
			return fmt.Errorf("cannot raise ambient capability %d: %w", n, err)
		}
	}
	return nil
}
