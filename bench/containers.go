package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	sandboxdv1 "github.com/sandboxd/sandboxd/api/proto/sandboxd/v1"
)

const container = sandboxdv1.Isolation_ISOLATION_CONTAINER

// peers are the runtimes measured beside ours, with one bundle made from our own effective OCI config, so that
// namespaces, mounts, capabilities and seccomp profile are the same.
type peers struct {
	dir    string
	runDir string
	rootfs string
	config specs.Spec
	next   int
}

// hostBase is where the peers' user namespaces begin on the host.
const hostBase = 1 << 20

func newPeers(ctx context.Context, b *bench) (*peers, error) {
	p := &peers{runDir: b.runDir, dir: filepath.Join(b.dir, "peers"), rootfs: filepath.Join(b.dir, "peers", "rootfs")}
	if err := os.MkdirAll(p.rootfs, 0o755); err != nil {
		return nil, err
	}
	if err := os.Chmod(b.dir, 0o755); err != nil {
		return nil, err
	}
	if err := command(ctx, "tar", "-C", p.rootfs, "--numeric-owner", "-xf", filepath.Join(b.cache, "images/busybox.tar")); err != nil {
		return nil, err
	}
	for _, sub := range []string{"proc", "sys", "dev", "tmp"} {
		if err := os.MkdirAll(filepath.Join(p.rootfs, sub), 0o755); err != nil {
			return nil, err
		}
	}
	if err := command(ctx, "chown", "-R", fmt.Sprintf("%d:%d", hostBase, hostBase), p.rootfs); err != nil {
		return nil, err
	}
	id, err := b.d.create(ctx, container, "true")
	if err != nil {
		return nil, err
	}
	c, err := b.d.workloads.GetOCIConfig(ctx, &sandboxdv1.GetOCIConfigRequest{Id: id})
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(c.GetConfig(), &p.config); err != nil {
		return nil, err
	}
	p.adapt()
	return p, b.d.delete(ctx, id)
}

// adapt makes of our config one that crun and runc take on a host without CAP_SYS_RESOURCE.
func (p *peers) adapt() {
	c := &p.config
	c.Version = "1.0.2" // what crun 1.8 knows; nothing newer is used
	c.Root = &specs.Root{Path: p.rootfs}
	c.Process.Terminal = false
	c.Process.User = specs.User{}
	c.Process.Rlimits = nil
	c.Hooks = nil
	c.Annotations = nil
	c.Linux.UIDMappings = []specs.LinuxIDMapping{{HostID: hostBase, Size: 65536}}
	c.Linux.GIDMappings = c.Linux.UIDMappings
	c.Linux.Namespaces = nil
	for _, n := range []specs.LinuxNamespaceType{
		specs.UserNamespace, specs.PIDNamespace, specs.MountNamespace, specs.NetworkNamespace,
		specs.IPCNamespace, specs.UTSNamespace, specs.CgroupNamespace,
	} {
		c.Linux.Namespaces = append(c.Linux.Namespaces, specs.LinuxNamespace{Type: n})
	}
	c.Linux.Resources = &specs.LinuxResources{
		CPU: c.Linux.Resources.CPU, Memory: c.Linux.Resources.Memory, Pids: c.Linux.Resources.Pids,
	}
}

// bundle writes a bundle whose process is cmd, in a cgroup of its own.
func (p *peers) bundle(name, cgroup string, cmd []string) (string, error) {
	dir := filepath.Join(p.dir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", err
	}
	c := p.config
	process := *c.Process
	process.Args = cmd
	c.Process = &process
	linux := *c.Linux
	linux.CgroupsPath = cgroup
	c.Linux = &linux
	b, err := json.Marshal(c)
	if err != nil {
		return "", err
	}
	return dir, os.WriteFile(filepath.Join(dir, "config.json"), b, 0o644)
}

// root is where an OCI runtime keeps its state.
func (p *peers) root(name string) string { return filepath.Join(p.runDir, name) }

// oci is an OCI runtime's `run`.
func (p *peers) oci(name string, includes string) (subject, error) {
	bundles := map[string]string{}
	for c := range commands {
		dir, err := p.bundle(name+"-"+c, p.cgroup(name+"-"+c), commands[c])
		if err != nil {
			return subject{}, err
		}
		bundles[c] = dir
	}
	return subject{name: name + " run", includes: includes, do: func(ctx context.Context, c string) (int, error) {
		p.next++
		return exitCode(exec.CommandContext(ctx, name, "--root", p.root(name), "run",
			"--bundle", bundles[c], fmt.Sprintf("bench-%d", p.next)))
	}}, nil
}

func (p *peers) cgroup(name string) string {
	return fmt.Sprintf("/sandboxd-bench-peers-%d/%s", os.Getpid(), name)
}

func (p *peers) bwrap() subject {
	return subject{name: "bwrap", includes: "user, pid, mount, net, ipc, uts namespaces; no cgroup, no seccomp profile", do: func(ctx context.Context, c string) (int, error) {
		args := []string{"--unshare-all", "--ro-bind", p.rootfs, "/", "--proc", "/proc", "--dev", "/dev"}
		return exitCode(exec.CommandContext(ctx, "bwrap", append(args, commands[c]...)...))
	}}
}

// podmanArgs keep podman's storage in the benchmark's directory; the limits are what a host without CAP_SYS_RESOURCE allows.
func (p *peers) podmanArgs(verb ...string) []string {
	return append([]string{
		"--root", filepath.Join(p.dir, "podman"), "--runroot", filepath.Join(p.dir, "podman-run"),
		"--runtime", "runc", "--cgroup-manager", "cgroupfs", "--log-level", "error",
	}, verb...)
}

var podmanLimits = []string{"--network", "none", "--ulimit", "nofile=1024:1024", "--ulimit", "nproc=1024:1024"}

func (p *peers) podman(ctx context.Context, b *bench) (subject, error) {
	if err := command(ctx, "podman", p.podmanArgs("import", filepath.Join(b.cache, "images/busybox.tar"), "bench")...); err != nil {
		return subject{}, err
	}
	return subject{name: "podman run (runc)", includes: "image store, conmon, OCI runtime, removal", do: func(ctx context.Context, c string) (int, error) {
		args := append([]string{"run", "--rm"}, podmanLimits...)
		return exitCode(exec.CommandContext(ctx, "podman", p.podmanArgs(append(append(args, "bench"), commands[c]...)...)...))
	}}, nil
}

func benchContainers(ctx context.Context, b *bench) ([]row, error) {
	d, p := b.d, b.p
	subjects := []subject{{
		name: "sandboxd container", includes: "gRPC RunWorkload to its removal; cgroup, namespaces, size-limited layer, seccomp, durable record",
		do: func(ctx context.Context, c string) (int, error) { return d.run(ctx, container, c) },
	}}
	const pool = 8
	o := b.options
	o.pool = pool
	pooled, err := startDaemon(ctx, o, b.dir)
	if err != nil {
		return nil, err
	}
	defer pooled.stop()
	subjects = append(subjects, subject{
		name: pooledName, includes: fmt.Sprintf("a second sandboxd with --agent-pool %d, which fills it between the runs", pool),
		do: func(ctx context.Context, c string) (int, error) { return pooled.run(ctx, container, c) },
	})
	subjects = append(subjects, subject{
		name: "in four calls", includes: "gRPC create, start, wait, delete, as callers do that have something to do between them",
		do: func(ctx context.Context, c string) (int, error) { return d.runInFour(ctx, container, c) },
	})
	if err := hideUnifiedCgroup(); err != nil {
		return nil, err
	}
	for _, name := range []string{"crun", "runc"} {
		s, err := p.oci(name, "the same OCI config as ours: namespaces, mounts, cgroup, seccomp; plain directory as root")
		if err != nil {
			return nil, err
		}
		subjects = append(subjects, s)
	}
	podman, err := p.podman(ctx, b)
	if err != nil {
		return nil, err
	}
	return measure(ctx, "container: create to exit, /bin/true", b.runs, append(subjects, podman, p.bwrap()))
}

// benchExec needs what benchContainers made: podman's image, and the peers' mount namespace.
func benchExec(ctx context.Context, b *bench) ([]row, error) {
	d, p := b.d, b.p
	ours, err := d.start(ctx, container, "sleep")
	if err != nil {
		return nil, err
	}
	defer func() { _ = d.delete(ctx, ours) }()
	inVM, err := d.start(ctx, vm, "sleep")
	if err != nil {
		return nil, err
	}
	defer func() { _ = d.delete(ctx, inVM) }()
	subjects := []subject{
		{name: "sandboxd container", includes: "gRPC Exec to exit seen", do: func(ctx context.Context, c string) (int, error) { return d.exec(ctx, ours, c) }},
		{name: "sandboxd vm", includes: "the same, in a VM", do: func(ctx context.Context, c string) (int, error) { return d.exec(ctx, inVM, c) }},
	}
	for _, name := range []string{"crun", "runc"} {
		end, err := p.sleeper(ctx, name)
		if err != nil {
			return nil, err
		}
		defer end()
		subjects = append(subjects, subject{name: name + " exec", includes: "one process of the runtime per exec", do: func(ctx context.Context, c string) (int, error) {
			args := append([]string{"--root", p.root(name), "exec", "sleeper-" + name}, commands[c]...)
			return exitCode(exec.CommandContext(ctx, name, args...))
		}})
	}
	args := append(append([]string{"run", "-d", "--name", "sleeper"}, podmanLimits...), "bench")
	if err := command(ctx, "podman", p.podmanArgs(append(args, commands["sleep"]...)...)...); err != nil {
		return nil, err
	}
	defer func() {
		_ = command(context.WithoutCancel(ctx), "podman", p.podmanArgs("rm", "-f", "-t", "0", "sleeper")...)
	}()
	subjects = append(subjects, subject{name: "podman exec (runc)", includes: "conmon and the runtime per exec", do: func(ctx context.Context, c string) (int, error) {
		return exitCode(exec.CommandContext(ctx, "podman", p.podmanArgs(append([]string{"exec", "sleeper"}, commands[c]...)...)...))
	}})
	return measure(ctx, "exec in a running sandbox, /bin/true", b.runs, subjects)
}

// sleeper starts a container of an OCI runtime that others exec into, and answers with what ends it.
func (p *peers) sleeper(ctx context.Context, name string) (func(), error) {
	bundle, err := p.bundle(name+"-sleeper", p.cgroup(name+"-sleeper"), commands["sleep"])
	if err != nil {
		return nil, err
	}
	root := p.root(name)
	if err := command(ctx, name, "--root", root, "run", "--detach", "--bundle", bundle, "sleeper-"+name); err != nil {
		return nil, err
	}
	return func() {
		_ = command(context.WithoutCancel(ctx), name, "--root", root, "delete", "--force", "sleeper-"+name)
	}, nil
}

// clean removes what the peers left in the cgroup hierarchies.
func (p *peers) clean() {
	parents, err := filepath.Glob(fmt.Sprintf("/sys/fs/cgroup/*/sandboxd-bench-peers-%d", os.Getpid()))
	if err != nil {
		return
	}
	for _, parent := range parents {
		children, err := os.ReadDir(parent)
		if err != nil {
			continue
		}
		for _, c := range children {
			if c.IsDir() {
				_ = os.Remove(filepath.Join(parent, c.Name()))
			}
		}
		_ = os.Remove(parent)
	}
}

// hideUnifiedCgroup gives this thread, and so the peers it starts, a mount namespace without the controller-less cgroup
// v2 mount of a hybrid host, on which crun 1.8 fails at once.
func hideUnifiedCgroup() error {
	const unified = "/sys/fs/cgroup/unified"
	if _, err := os.Stat(unified); err != nil {
		return nil
	}
	if err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS); err != nil {
		return fmt.Errorf("cannot make a mount namespace for the peers: %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("cannot make mounts private for the peers: %w", err)
	}
	if err := unix.Unmount(unified, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("cannot hide %s from the peers: %w", unified, err)
	}
	return nil
}

// exitCode runs a command and answers with its exit code; what it says on stderr is shown when it cannot be run or
// exits with a code of the tool's own.
func exitCode(cmd *exec.Cmd) (int, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		if code := exit.ExitCode(); code == 7 {
			return code, nil
		}
		return exit.ExitCode(), fmt.Errorf("%s: %s", strings.Join(cmd.Args, " "), strings.TrimSpace(stderr.String()))
	}
	return 0, err
}

func command(ctx context.Context, name string, args ...string) error {
	// A detached container inherits what its runtime was given, so nothing of ours may wait for its output's end.
	cmd := exec.CommandContext(ctx, name, args...)
	out, err := os.CreateTemp("", "bench-"+strconv.Itoa(os.Getpid()))
	if err != nil {
		return err
	}
	defer os.Remove(out.Name())
	defer out.Close()
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Run(); err != nil {
		said, _ := os.ReadFile(out.Name())
		return fmt.Errorf("cannot run %s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(said))
	}
	return nil
}
