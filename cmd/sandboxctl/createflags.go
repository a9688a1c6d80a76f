package main

import (
	"bufio"
	"encoding/csv"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/pflag"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

// createFlags are what create, run and policy explain say about a workload.
type createFlags struct {
	resourceFlags

	name, isolation                              string
	env, envFiles, labels, mounts, tmpfs         []string
	capAdd, capDrop, ulimits, securityOpts       []string
	user, workdir, hostname, network, stopSignal string
	entrypoint                                   string
	readOnly, snapshots, interactive, tty        bool
	// Of create and run only.
	key string
}

func (c *createFlags) registerKey(f *pflag.FlagSet) {
	f.StringVar(&c.key, "idempotency-key", "", "chosen by you: the same call again, with the same key, makes no second workload but goes on with the first")
}

func (c *createFlags) register(f *pflag.FlagSet) {
	c.resourceFlags.register(f)
	f.StringVar(&c.name, "name", "", "unique name; made up when left out")
	f.StringVar(&c.isolation, "isolation", "auto", "auto (what the policy demands), container or vm")
	f.StringArrayVarP(&c.env, "env", "e", nil, "NAME=value, or NAME to take it from here; may be repeated")
	f.StringArrayVar(&c.envFiles, "env-file", nil, "file with such lines; may be repeated")
	f.StringVarP(&c.user, "user", "u", "", "NAME|UID[:GROUP|GID] in the image")
	f.StringVarP(&c.workdir, "workdir", "w", "", "working directory in the sandbox")
	f.StringVar(&c.hostname, "hostname", "", "host name; the id's first digits when left out")
	f.StringArrayVarP(&c.labels, "label", "l", nil, "key=value for filters and the policy; may be repeated")
	f.StringArrayVar(&c.mounts, "mount", nil, "type=tmpfs,target=/x[,size=64m][,mode=1777][,readonly]; may be repeated")
	f.StringArrayVar(&c.tmpfs, "tmpfs", nil, "/x[:size=64m,mode=1777,ro]; may be repeated")
	f.BoolVar(&c.readOnly, "read-only", false, "the root file system refuses every write")
	f.BoolVar(&c.snapshots, "snapshots", false, "snapshots of it can be taken, and it can be forked, while it runs: a VM without a network")
	f.StringVar(&c.network, "network", "none", "none (loopback only), or a CNI network of the daemon's; sandboxctl doctor lists them")
	f.StringSliceVar(&c.capAdd, "cap-add", nil, "capability beyond the default set; may be repeated")
	f.StringSliceVar(&c.capDrop, "cap-drop", nil, "capability to take from it, or ALL; may be repeated")
	f.StringArrayVar(&c.ulimits, "ulimit", nil, "TYPE=SOFT[:HARD], such as nofile=1024:2048; may be repeated")
	f.StringArrayVar(&c.securityOpts, "security-opt", nil, "seccomp=FILE (a profile as docker reads it) or seccomp=unconfined, where the policy grants it")
	f.StringVar(&c.entrypoint, "entrypoint", "", "program instead of the image's entrypoint; empty to have none")
	f.StringVar(&c.stopSignal, "stop-signal", "", "what stop sends first, such as SIGTERM")
	boolFlag(f, &c.interactive, "interactive", "i", "keep standard input open")
	boolFlag(f, &c.tty, "tty", "t", "give the process a terminal")
}

// request is the workload that flags, image and command ask for.
func (c *createFlags) request(image string, command []string) (*sandboxdv1.CreateWorkloadRequest, error) {
	isolation, err := parseIsolation(c.isolation)
	if err != nil {
		return nil, err
	}
	labels, err := parseLabels(c.labels)
	if err != nil {
		return nil, err
	}
	resources, err := c.resources(0)
	if err != nil {
		return nil, err
	}
	process, err := c.process(command)
	if err != nil {
		return nil, err
	}
	spec := &sandboxdv1.WorkloadSpec{
		Image: image, Isolation: isolation, Process: process, Resources: resources,
		Hostname: c.hostname, Network: c.network, ReadOnlyRoot: c.readOnly, Snapshots: c.snapshots, StopSignal: c.stopSignal,
		CapAdd: upper(c.capAdd), CapDrop: upper(c.capDrop),
	}
	if spec.Seccomp, err = parseSecurityOpts(c.securityOpts); err != nil {
		return nil, err
	}
	for _, m := range c.mounts {
		mount, err := parseMount(m)
		if err != nil {
			return nil, err
		}
		spec.Mounts = append(spec.Mounts, mount)
	}
	for _, m := range c.tmpfs {
		mount, err := parseTmpfs(m)
		if err != nil {
			return nil, err
		}
		spec.Mounts = append(spec.Mounts, mount)
	}
	return &sandboxdv1.CreateWorkloadRequest{IdempotencyKey: c.key, Name: c.name, Labels: labels, Spec: spec}, nil
}

func (c *createFlags) process(command []string) (*sandboxdv1.ProcessSpec, error) {
	env, err := environment(c.env, c.envFiles)
	if err != nil {
		return nil, err
	}
	p := &sandboxdv1.ProcessSpec{
		Command: command, Env: env, User: c.user, WorkingDir: c.workdir, Terminal: c.tty, Stdin: c.interactive,
	}
	// An empty entrypoint is a wish, too: none.
	if c.set.Changed("entrypoint") {
		p.Entrypoint = []string{c.entrypoint}
	}
	for _, u := range c.ulimits {
		limit, err := parseUlimit(u)
		if err != nil {
			return nil, err
		}
		p.Rlimits = append(p.Rlimits, limit)
	}
	return p, nil
}

func parseIsolation(s string) (sandboxdv1.Isolation, error) {
	switch s {
	case "auto":
		return sandboxdv1.Isolation_ISOLATION_AUTO, nil
	case "container":
		return sandboxdv1.Isolation_ISOLATION_CONTAINER, nil
	case "vm":
		return sandboxdv1.Isolation_ISOLATION_VM, nil
	}
	return 0, fmt.Errorf("cannot use isolation %q: it is auto, container or vm", s)
}

func parseLabels(list []string) (map[string]string, error) {
	labels := make(map[string]string)
	for _, l := range list {
		key, value, _ := strings.Cut(l, "=")
		if key == "" {
			return nil, fmt.Errorf("cannot use label %q: write key=value", l)
		}
		labels[key] = value
	}
	return labels, nil
}

func upper(list []string) []string {
	var out []string
	for _, s := range list {
		out = append(out, strings.ToUpper(s))
	}
	return out
}

// environment is what files say, then what flags say: the last one wins in the sandbox.
func environment(flags, files []string) ([]string, error) {
	var env []string
	for _, path := range files {
		lines, err := readEnvFile(path)
		if err != nil {
			return nil, err
		}
		env = append(env, lines...)
	}
	return appendEnv(env, flags)
}

// appendEnv takes NAME=value as it is and NAME from this program's own environment, if it is there.
func appendEnv(env, list []string) ([]string, error) {
	for _, e := range list {
		name, _, has := strings.Cut(e, "=")
		if name == "" {
			return nil, fmt.Errorf("cannot use variable %q: write NAME=value", e)
		}
		if has {
			env = append(env, e)
		} else if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	return env, nil
}

// readEnvFile reads lines of NAME=value or NAME, as docker does: no quoting; empty lines and those with # first are none.
func readEnvFile(path string) ([]string, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read --env-file: %w", err)
	}
	defer f.Close()
	var env []string
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimLeft(lines.Text(), " \t")
		if line == "" || line[0] == '#' {
			continue
		}
		if env, err = appendEnv(env, []string{line}); err != nil {
			return nil, fmt.Errorf("%s: line %d: %w", path, n, err)
		}
	}
	if err := lines.Err(); err != nil {
		return nil, fmt.Errorf("cannot read --env-file %s: %w", path, err)
	}
	return env, nil
}

// parseMount reads what --mount says: comma-separated key=value in any order.
func parseMount(s string) (*sandboxdv1.Mount, error) {
	fields, err := csv.NewReader(strings.NewReader(s)).Read()
	if err != nil {
		return nil, fmt.Errorf("cannot use --mount %q: write type=tmpfs,target=/x", s)
	}
	m := &sandboxdv1.Mount{}
	for _, field := range fields {
		if err := mountOption(m, field); err != nil {
			return nil, fmt.Errorf("cannot use --mount %q: %w", s, err)
		}
	}
	switch {
	case m.GetType() == sandboxdv1.Mount_TYPE_UNSPECIFIED:
		return nil, fmt.Errorf("cannot use --mount %q: type is missing: write type=tmpfs or type=bind", s)
	case m.GetTarget() == "":
		return nil, fmt.Errorf("cannot use --mount %q: target is missing", s)
	}
	return m, nil
}

// parseTmpfs reads what --tmpfs says: /target[:option,…].
func parseTmpfs(s string) (*sandboxdv1.Mount, error) {
	target, options, _ := strings.Cut(s, ":")
	m := &sandboxdv1.Mount{Type: sandboxdv1.Mount_TYPE_TMPFS, Target: target}
	if options == "" {
		return m, nil
	}
	for o := range strings.SplitSeq(options, ",") {
		if key, _, _ := strings.Cut(o, "="); key == "type" || key == "target" || key == "source" {
			return nil, fmt.Errorf("cannot use --tmpfs %q: unknown option %q: there are size, mode, ro and rw", s, o)
		}
		if err := mountOption(m, o); err != nil {
			return nil, fmt.Errorf("cannot use --tmpfs %q: %w", s, err)
		}
	}
	return m, nil
}

func mountOption(m *sandboxdv1.Mount, option string) (err error) {
	key, value, has := strings.Cut(option, "=")
	switch key {
	case "type":
		switch value {
		case "tmpfs":
			m.Type = sandboxdv1.Mount_TYPE_TMPFS
		case "bind":
			m.Type = sandboxdv1.Mount_TYPE_BIND
		default:
			return fmt.Errorf("unknown type %q: there are tmpfs and bind", value)
		}
	case "source", "src":
		m.Source = value
	case "target", "destination", "dst":
		m.Target = value
	case "size", "tmpfs-size":
		m.SizeBytes, err = parseBytes(value)
	case "mode", "tmpfs-mode":
		m.Mode, err = parseMode(value)
	case "ro", "readonly", "read-only":
		m.ReadOnly = true
		if has {
			m.ReadOnly, err = strconv.ParseBool(value)
		}
	case "rw":
		m.ReadOnly = false
	default:
		return fmt.Errorf("unknown option %q: there are type, source, target, size, mode and readonly", key)
	}
	return err
}

// parseUlimit reads TYPE=SOFT[:HARD].
func parseUlimit(s string) (*sandboxdv1.Rlimit, error) {
	name, values, ok := strings.Cut(s, "=")
	soft, hard, both := strings.Cut(values, ":")
	if !both {
		hard = soft
	}
	l := &sandboxdv1.Rlimit{Type: name}
	var err1, err2 error
	l.Soft, err1 = parseLimit(soft)
	l.Hard, err2 = parseLimit(hard)
	if !ok || name == "" || errors.Join(err1, err2) != nil {
		return nil, fmt.Errorf("cannot use --ulimit %q: write TYPE=SOFT or TYPE=SOFT:HARD, such as nofile=1024:2048", s)
	}
	return l, nil
}
