package guest

import (
	"encoding/json"

	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// knownSpec is what of an OCI config an agent does, or refuses to do (rootfs.refuse); the rest is the daemon's (namespaces, id
// maps, a container's limits) or for who reads it. It is decoded instead of a specs.Spec because encoding/json looks at all of a
// type, what it has for other systems too, before it decodes the first value of it: at a container's start that took longer than
// all the values.
type knownSpec struct {
	Process  *specs.Process `json:"process"`
	Root     *specs.Root    `json:"root"`
	Hostname string         `json:"hostname"`
	Mounts   []specs.Mount  `json:"mounts"`
	Hooks    *anyObject     `json:"hooks"`
	Linux    *knownLinux    `json:"linux"`
}

type knownLinux struct {
	Sysctl            map[string]string `json:"sysctl"`
	Resources         *knownResources   `json:"resources"`
	Devices           []anyObject       `json:"devices"`
	Seccomp           *anyObject        `json:"seccomp"`
	RootfsPropagation string            `json:"rootfsPropagation"`
	MaskedPaths       []string          `json:"maskedPaths"`
	ReadonlyPaths     []string          `json:"readonlyPaths"`
}

// knownResources are what a guest's agent limits by its own kernel.
type knownResources struct {
	Pids    *specs.LinuxPids  `json:"pids"`
	Unified map[string]string `json:"unified"`
}

// anyObject is a JSON object of which it only matters that it is there.
type anyObject struct{}

// decodeSpec answers with a config that has nothing but what knownSpec has.
func decodeSpec(b []byte) (*specs.Spec, error) {
	k := &knownSpec{}
	if err := decodeConfig(b, k); err != nil {
		return nil, err
	}
	config := &specs.Spec{Process: k.Process, Root: k.Root, Hostname: k.Hostname, Mounts: k.Mounts}
	if k.Hooks != nil {
		config.Hooks = &specs.Hooks{}
	}
	l := k.Linux
	if l == nil {
		return config, nil
	}
	config.Linux = &specs.Linux{
		Sysctl: l.Sysctl, RootfsPropagation: l.RootfsPropagation, MaskedPaths: l.MaskedPaths, ReadonlyPaths: l.ReadonlyPaths,
		Devices: make([]specs.LinuxDevice, len(l.Devices)),
	}
	if l.Seccomp != nil {
		config.Linux.Seccomp = &specs.LinuxSeccomp{}
	}
	if l.Resources != nil {
		config.Linux.Resources = &specs.LinuxResources{Pids: l.Resources.Pids, Unified: l.Resources.Unified}
	}
	return config, nil
}

// decodeConfig decodes a config, or a process of one.
func decodeConfig(b []byte, into any) error {
	if len(b) > maxConfigBytes {
		return invalid("a configuration of %d bytes is larger than %d", len(b), maxConfigBytes)
	}
	if err := json.Unmarshal(b, into); err != nil {
		return invalid("cannot decode the configuration: %v", err)
	}
	return nil
}
