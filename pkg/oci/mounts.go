package oci

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// defaultTmpfsSize is docker's, in bytes. It counts against the workload's memory.
	defaultTmpfsSize = 64 << 20
	// defaultTmpfsMode is that of /tmp.
	defaultTmpfsMode = 0o1777
	// maxMounts is the API's limit, kept here too for requests that did not come through it.
	maxMounts = 64
)

// systemMount is one row of what every sandbox has mounted, before anything the caller asks for.
type systemMount struct {
	specs.Mount
	reason string
}

// systemMounts come in the order they are made. Each is a mount of the sandbox's own kernel or namespace; none shows
// anything of the host's file systems. The agent adds to /dev the six nodes every program relies on (null, zero,
// full, random, urandom, tty) and the links fd, stdin, stdout, stderr, ptmx.
var systemMounts = []systemMount{
	{specs.Mount{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev", "hidepid=invisible", "gid=0"}},
		"its own processes, and kernel settings that maskedPaths and readonlyPaths then narrow; who is not of root's group sees the processes of no other user, and no PID 1"},
	{specs.Mount{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "noexec", "strictatime", "mode=755", "size=65536k"}},
		"device nodes; a tmpfs, so that the image cannot bring its own"},
	{specs.Mount{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		"terminals of its own; gid 5 is tty in every distribution"},
	{specs.Mount{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
		"programs look up processors and network interfaces there; nobody may change anything"},
	{specs.Mount{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		"POSIX message queues of its own ipc namespace"},
	{specs.Mount{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		"POSIX shared memory; docker's size"},
}

// protectedTargets are where a caller's mount would replace what the sandbox's confinement or its terminals rest on.
// /dev/shm is not one: giving it another size is what docker's users do.
var protectedTargets = []struct {
	path string
	// Whether everything below is protected too.
	below  bool
	reason string
}{
	{"/", false, "it is the root file system"},
	{"/proc", true, "masked and read-only paths lie there"},
	{"/sys", true, "masked and read-only paths lie there"},
	{"/dev", false, "the sandbox's device nodes lie there"},
	{"/dev/pts", true, "the sandbox's terminals lie there"},
	{"/dev/mqueue", true, "the sandbox's message queues lie there"},
}

// mountsOf is the table, then what the caller asks for, parents before what lies below them.
func mountsOf(asked []spec.Mount) ([]specs.Mount, error) {
	if len(asked) > maxMounts {
		return nil, spec.Invalidf("spec.mounts", "%d mounts are too many: at most %d", len(asked), maxMounts)
	}
	own := make([]specs.Mount, 0, len(asked))
	for i, m := range asked {
		converted, err := mountOf(fmt.Sprintf("spec.mounts[%d]", i), m)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(own, func(o specs.Mount) bool { return o.Destination == converted.Destination }) {
			return nil, spec.Invalidf(fmt.Sprintf("spec.mounts[%d].target", i), "%s is the target of two mounts", converted.Destination)
		}
		own = append(own, converted)
	}
	slices.SortStableFunc(own, func(a, b specs.Mount) int {
		return cmp.Compare(strings.Count(a.Destination, "/"), strings.Count(b.Destination, "/"))
	})

	out := make([]specs.Mount, 0, len(systemMounts)+len(own))
	for _, row := range systemMounts {
		if slices.ContainsFunc(own, func(o specs.Mount) bool { return o.Destination == row.Destination }) {
			continue // only /dev/shm gets this far
		}
		m := row.Mount
		m.Options = slices.Clone(m.Options)
		out = append(out, m)
	}
	return append(out, own...), nil
}

func mountOf(field string, m spec.Mount) (specs.Mount, error) {
	switch m.Type {
	case spec.MountTmpfs:
	case spec.MountBind:
		return specs.Mount{}, &spec.Error{Kind: spec.KindUnsupported, Field: field, Err: fmt.Errorf(
			"a bind mount of %s is not supported yet; copy files in with `sandboxctl cp %s ID:%s`", m.Source, m.Source, m.Target)}
	default:
		return specs.Mount{}, spec.Invalidf(field+".type", "mount type %q is unknown; use tmpfs", m.Type)
	}
	target, err := checkTarget(m.Target)
	if err != nil {
		return specs.Mount{}, spec.Invalidf(field+".target", "%w", err)
	}
	if m.Source != "" {
		return specs.Mount{}, spec.Invalidf(field+".source", "a tmpfs has no source")
	}
	if m.Mode > 0o7777 {
		return specs.Mount{}, spec.Invalidf(field+".mode", "mode %#o has more than permission bits", m.Mode)
	}
	if m.SizeBytes > maxTmpfsSize {
		return specs.Mount{}, spec.Invalidf(field+".size_bytes", "a tmpfs lies in memory and cannot have %d bytes: give it at most %d", m.SizeBytes, uint64(maxTmpfsSize))
	}
	size, mode := m.SizeBytes, m.Mode
	if size == 0 {
		size = defaultTmpfsSize
	}
	if mode == 0 {
		mode = defaultTmpfsMode
	}
	options := []string{"nosuid", "noexec", "nodev", fmt.Sprintf("mode=%o", mode), fmt.Sprintf("size=%d", size)}
	if m.ReadOnly {
		options = append(options, "ro")
	}
	return specs.Mount{Destination: target, Type: "tmpfs", Source: "tmpfs", Options: options}, nil
}

// checkTarget gives the clean form of a mount's target. That the path leads out of the root through a link in the image
// is the agent's to prevent: only it sees the image.
func checkTarget(target string) (string, error) {
	if !strings.HasPrefix(target, "/") || hasNUL(target) {
		return "", fmt.Errorf("mount target %q is not an absolute path", target)
	}
	if slices.Contains(strings.Split(target, "/"), "..") {
		return "", fmt.Errorf("mount target %q has .. in it", target)
	}
	clean := absolute(target)
	for _, p := range protectedTargets {
		if clean == p.path || p.below && strings.HasPrefix(clean, p.path+"/") {
			return "", fmt.Errorf("nothing may be mounted at %s: %s", clean, p.reason)
		}
	}
	return clean, nil
}
