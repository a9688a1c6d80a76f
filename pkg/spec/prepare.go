package spec

import (
	"encoding/json"
	"fmt"
	"path"
	"reflect"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// coveredMounts may be mounted before a workload's own files are written: nothing of these is in them.
var coveredMounts = []string{"/proc", "/sys", "/dev"}

// Preparable reports whether a root of such a config can be made before it is known whose it will be: its own files are written
// last then, so the root must be writable and nothing mounted where they lie.
func Preparable(c *specs.Spec) bool {
	if c.Linux == nil || c.Root == nil || c.Root.Readonly {
		return false
	}
	for _, m := range c.Mounts {
		if !covered(m.Destination) {
			return false
		}
	}
	return c.Process == nil || !covered(c.Process.Cwd) // which is made where it is not
}

func covered(name string) bool {
	name = path.Clean("/" + name)
	for _, m := range coveredMounts {
		if name == m || strings.HasPrefix(name, m+"/") {
			return true
		}
	}
	return false
}

// Preparation is what ContainerBoot.Prepare says for a container of this config; nil if it is not Preparable.
func Preparation(c *specs.Spec) ([]byte, error) {
	if !Preparable(c) {
		return nil, nil
	}
	b, err := json.Marshal(&specs.Spec{
		Version: c.Version, Root: c.Root, Mounts: c.Mounts,
		Linux: &specs.Linux{
			Sysctl: c.Linux.Sysctl, MaskedPaths: c.Linux.MaskedPaths, ReadonlyPaths: c.Linux.ReadonlyPaths,
			RootfsPropagation: c.Linux.RootfsPropagation,
		},
	})
	if err != nil {
		return nil, fmt.Errorf("cannot encode what a root will be like: %w", err)
	}
	return b, nil
}

// PreparedFor reports whether a root that was made as prepared says is one for the config c.
func PreparedFor(prepared, c *specs.Spec) bool {
	if c.Linux == nil || prepared.Linux == nil || !Preparable(c) {
		return false
	}
	p, l := prepared.Linux, c.Linux
	return reflect.DeepEqual(prepared.Root, c.Root) && reflect.DeepEqual(prepared.Mounts, c.Mounts) &&
		reflect.DeepEqual(p.Sysctl, l.Sysctl) && reflect.DeepEqual(p.MaskedPaths, l.MaskedPaths) &&
		reflect.DeepEqual(p.ReadonlyPaths, l.ReadonlyPaths) && p.RootfsPropagation == l.RootfsPropagation
}
