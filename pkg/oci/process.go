package oci

import (
	"slices"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

const (
	// defaultPath is docker's, for an image that sets none.
	defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	// defaultTerm is what a process with a terminal is told it has.
	defaultTerm = "TERM=xterm"
	// defaultUser is asked for by number, for an image need not have a passwd file; resolving it gives root's
	// supplementary groups where the image has one.
	defaultUser = "0"
)

// processOf is the workload's own process: the image's configuration with the request over it.
func processOf(w spec.Workload, img spec.ImageConfig, hostname string, granted spec.Isolation) (*specs.Process, error) {
	args, err := argsOf(w.Process, img)
	if err != nil {
		return nil, err
	}
	caps, err := capabilitiesOf(w.CapAdd, w.CapDrop)
	if err != nil {
		return nil, err
	}
	rlimits, err := rlimitsOf(w.Process.Rlimits, granted)
	if err != nil {
		return nil, err
	}

	env := []string{defaultPath, "HOSTNAME=" + hostname}
	if w.Process.Terminal {
		env = append(env, defaultTerm)
	}
	env, err = mergeEnv(env, img.Env, w.Process.Env)
	if err != nil {
		return nil, err
	}

	p := &specs.Process{
		Args:         args,
		Env:          env,
		Cwd:          absolute(first(w.Process.WorkingDir, img.WorkingDir)),
		User:         specs.User{Username: first(w.Process.User, img.User, defaultUser)},
		Capabilities: caps,
		Rlimits:      rlimits,
		// Set-user-id programs in the image gain nothing.
		NoNewPrivileges: true,
	}
	setTerminal(p, w.Process)
	return p, checkProcess(p)
}

// ExecProcess is a further process p in the container whose own process is base. p.Command is the whole argument
// vector; what else p leaves out is base's. It never has more capabilities than base.
func ExecProcess(base *specs.Process, p spec.Process) (*specs.Process, error) {
	if len(p.Entrypoint) > 0 {
		return nil, spec.Invalidf("process.entrypoint", "an exec has no entrypoint: put the whole command into process.command")
	}
	if len(p.Command) == 0 {
		return nil, spec.Invalidf("process.command", "nothing to run: give a command")
	}
	var terminal []string
	if p.Terminal {
		terminal = []string{defaultTerm}
	}
	env, err := mergeEnv(terminal, base.Env, p.Env)
	if err != nil {
		return nil, err
	}

	out := *base
	out.Args = slices.Clone(p.Command)
	out.Env = env
	out.Cwd = absolute(first(p.WorkingDir, base.Cwd))
	if p.User != "" {
		out.User = specs.User{Username: p.User}
	}
	if out.Rlimits, err = overrideRlimits(base.Rlimits, p.Rlimits); err != nil {
		return nil, err
	}
	setTerminal(&out, p)
	return &out, checkProcess(&out)
}

// argsOf is docker's rule: a given entrypoint replaces the image's and clears the image's command; a given command
// replaces the image's.
func argsOf(p spec.Process, img spec.ImageConfig) ([]string, error) {
	entrypoint, command := img.Entrypoint, img.Command
	if len(p.Entrypoint) > 0 {
		entrypoint, command = p.Entrypoint, nil
		if len(entrypoint) == 1 && entrypoint[0] == "" {
			entrypoint = nil
		}
	}
	if len(p.Command) > 0 {
		command = p.Command
	}
	args := slices.Concat(entrypoint, command)
	if len(args) == 0 {
		return nil, spec.Invalidf("spec.process.command", "nothing to run: the image names no command, so give one")
	}
	return args, nil
}

// mergeEnv puts lists of NAME=value over each other. The first place a name has in the result is the one it keeps; the
// last value wins. Entries without a name or without a value are an image's mistake and are left out, as docker does.
func mergeEnv(lists ...[]string) ([]string, error) {
	var out []string
	at := map[string]int{}
	for _, entry := range slices.Concat(lists...) {
		name, _, found := strings.Cut(entry, "=")
		if !found || name == "" {
			continue
		}
		if hasNUL(entry) {
			return nil, spec.Invalidf("spec.process.env", "environment variable %q has a NUL byte in it", name)
		}
		if i, seen := at[name]; seen {
			out[i] = entry
			continue
		}
		at[name] = len(out)
		out = append(out, entry)
	}
	return out, nil
}

func setTerminal(out *specs.Process, p spec.Process) {
	out.Terminal, out.ConsoleSize = p.Terminal, nil
	if p.Terminal && p.TerminalSize != (spec.TerminalSize{}) {
		out.ConsoleSize = &specs.Box{Height: uint(p.TerminalSize.Rows), Width: uint(p.TerminalSize.Columns)}
	}
}

// checkProcess refuses what the kernel would see differently from us.
func checkProcess(p *specs.Process) error {
	if p.Args[0] == "" {
		return spec.Invalidf("spec.process.command", "nothing to run: the command's first word is empty")
	}
	for _, field := range []struct {
		name   string
		values []string
	}{{"command", p.Args}, {"working_dir", []string{p.Cwd}}, {"user", []string{p.User.Username}}} {
		if slices.ContainsFunc(field.values, hasNUL) {
			return spec.Invalidf("spec.process."+field.name, "%s %q has a NUL byte in it", field.name, field.values)
		}
	}
	return nil
}

// first is the first value that is not empty.
func first(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}
