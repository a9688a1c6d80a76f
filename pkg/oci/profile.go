package oci

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"slices"

	"github.com/moby/profiles/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// maxProfile is the API's limit of a profile, in bytes, kept here too for requests that did not come through it.
const maxProfile = 256 << 10

// profileOf is the seccomp profile of config, whose capabilities decide on some of its rules; nil for none. Whether a caller
// may have another than the default is the policy's to say, and was said.
func profileOf(asked spec.Seccomp, config *specs.Spec) (*specs.LinuxSeccomp, error) {
	const field = "spec.seccomp"
	switch {
	case asked.Unconfined && asked.Profile != "":
		return nil, spec.Invalidf(field, "a seccomp profile and none are asked for at once: give one of them")
	case asked.Unconfined:
		return nil, nil
	case asked.Profile == "":
		p, err := seccomp.GetDefaultProfile(config)
		if err != nil {
			return nil, spec.Errorf(spec.KindInternal, "cannot make the seccomp profile: %w", err)
		}
		return onlyNative(p), nil
	}
	p, err := readProfile(asked.Profile, config)
	if err == nil {
		p = onlyNative(p)
		_, err = CompileSeccomp(p) // now, not at the start
	}
	if err != nil {
		return nil, spec.Invalidf(field+".profile", "the seccomp profile cannot be used: %w", err)
	}
	return p, nil
}

// readProfile reads a profile as docker does, but strictly: a rule whose condition was mistyped must not become one without.
func readProfile(text string, config *specs.Spec) (*specs.LinuxSeccomp, error) {
	if len(text) > maxProfile {
		return nil, errors.New("it is larger than 256 KiB")
	}
	var checked seccomp.Seccomp
	d := json.NewDecoder(bytes.NewReader([]byte(text)))
	d.DisallowUnknownFields()
	if err := d.Decode(&checked); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows it")
	}
	if slices.Contains(checked.Syscalls, nil) {
		return nil, errors.New("one of its syscalls is null")
	}
	if checked.DefaultAction == "" {
		// docker takes that for no filter at all when there are no rules either.
		return nil, errors.New("it has no defaultAction; ask for unconfined to have no filter")
	}
	return seccomp.LoadProfile(text, config)
}

// onlyNative takes the 32-bit ABIs away that profiles name. They would double the kernel's attack surface, and socketcall(2)
// would go round a profile's list of socket families; images for them are not what linux/amd64 pulls. CompileSeccomp kills
// a process that uses i386's and answers ENOSYS for x32's, as a kernel without x32 does.
func onlyNative(p *specs.LinuxSeccomp) *specs.LinuxSeccomp {
	p.Architectures = []specs.Arch{specs.ArchX86_64}
	return p
}
