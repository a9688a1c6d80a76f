package oci

import (
	"path"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Annotations of every configuration this package makes.
const (
	AnnotationID        = "io.sandboxd.id"
	AnnotationIsolation = "io.sandboxd.isolation"
)

// defaultHostnameLen is how many digits of the id make a host name, as docker has it.
const defaultHostnameLen = 12

// Config is the effective configuration of the workload w with the given id, made from an image that says img, behind
// the wall granted. It reads nothing but its arguments, the running kernel's release (the seccomp profile has a row that
// depends on it) and this process's own resource limits, which a container cannot exceed.
//
// Errors are spec.Errors that name the field at fault.
func Config(id string, w spec.Workload, img spec.ImageConfig, granted spec.Isolation) (*specs.Spec, error) {
	if len(id) < defaultHostnameLen {
		return nil, spec.Errorf(spec.KindInternal, "cannot configure workload %q: its id has fewer than %d digits", id, defaultHostnameLen)
	}
	namespaces, err := namespacesOf(granted)
	if err != nil {
		return nil, err
	}
	if err := checkResources(w.Resources, granted); err != nil {
		return nil, err
	}
	mounts, err := mountsOf(w.Mounts)
	if err != nil {
		return nil, err
	}
	// Whatever ends the workload one day must not be the first to look at it.
	if _, err := StopSignal(w, img); err != nil {
		return nil, err
	}
	hostname := w.Hostname
	if hostname == "" {
		hostname = id[:defaultHostnameLen]
	}
	process, err := processOf(w, img, hostname, granted)
	if err != nil {
		return nil, err
	}

	c := &specs.Spec{
		Version:     specs.Version,
		Process:     process,
		Root:        &specs.Root{Path: "rootfs", Readonly: w.ReadOnlyRoot},
		Hostname:    hostname,
		Mounts:      mounts,
		Annotations: map[string]string{AnnotationID: id, AnnotationIsolation: string(granted)},
		Linux: &specs.Linux{
			Namespaces:    namespaces,
			Sysctl:        sysctlsOf(),
			Resources:     resourcesOf(w.Resources),
			MaskedPaths:   pathsOf(maskedPaths),
			ReadonlyPaths: pathsOf(readonlyPaths),
		},
	}
	if c.Linux.Seccomp, err = profileOf(w.Seccomp, c); err != nil {
		return nil, err
	}
	return c, nil
}

// namespacesOf lists what the sandbox has for itself. A container's agent is cloned into all of them. A VM needs none:
// it has the whole guest kernel.
func namespacesOf(granted spec.Isolation) ([]specs.LinuxNamespace, error) {
	switch granted {
	case spec.IsolationContainer:
		return []specs.LinuxNamespace{
			{Type: specs.UserNamespace}, // root inside is nobody outside; without it every capability below is one on the host
			{Type: specs.PIDNamespace},  // sees and signals only its own; dies with the agent
			{Type: specs.MountNamespace},
			{Type: specs.NetworkNamespace}, // also holds abstract Unix sockets
			{Type: specs.IPCNamespace},     // System V IPC, POSIX message queues
			{Type: specs.UTSNamespace},
			{Type: specs.CgroupNamespace}, // hides where on the host it is
		}, nil
	case spec.IsolationVM:
		return nil, nil
	default:
		return nil, spec.Errorf(spec.KindInternal, "cannot configure a workload: isolation %q is not decided", granted)
	}
}

// absolute is p as a clean path from the root: an image's working directory is what its maker typed.
func absolute(p string) string {
	return path.Clean("/" + p)
}

// hasNUL reports whether the kernel would see a shorter string than we do.
func hasNUL(s string) bool { return strings.IndexByte(s, 0) >= 0 }
