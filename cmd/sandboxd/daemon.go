package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/access"
	"github.com/sandboxd/sandboxd/pkg/audit"
	"github.com/sandboxd/sandboxd/pkg/cgroup"
	"github.com/sandboxd/sandboxd/pkg/disk"
	"github.com/sandboxd/sandboxd/pkg/idrange"
	"github.com/sandboxd/sandboxd/pkg/image"
	"github.com/sandboxd/sandboxd/pkg/network"
	"github.com/sandboxd/sandboxd/pkg/phase"
	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/runtime/container"
	"github.com/sandboxd/sandboxd/pkg/runtime/microvm"
	"github.com/sandboxd/sandboxd/pkg/server"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/workload"
)

// daemon is everything that runs, put together.
type daemon struct {
	listener net.Listener
	socket   string
	// Over TCP.
	remote []net.Listener
	server *server.Server
	config config
	tls    *server.TLSFiles
	// What to do when it ends, or when its start fails: the last one first.
	undo []func() error
	// alive returns once it had every lock that all calls need: for the watchdog.
	alive func()
}

func (d *daemon) close() error {
	var errs []error
	for _, fn := range slices.Backward(d.undo) {
		errs = append(errs, fn())
	}
	return errors.Join(errs...)
}

func (d *daemon) onClose(fn func() error) { d.undo = append(d.undo, fn) }

// start builds the daemon, brings its records back to the truth and opens its socket; Serve makes it answer.
func start(ctx context.Context, c config, log *zap.Logger) (_ *daemon, err error) {
	d := &daemon{config: c}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.close())
		}
	}()
	if err := d.takeDirs(c); err != nil {
		return nil, err
	}
	if err := d.openTrace(c.trace); err != nil {
		return nil, err
	}
	trail, err := d.openAudit(c)
	if err != nil {
		return nil, err
	}
	rules, err := loadPolicy(c.policy)
	if err != nil {
		return nil, err
	}
	roles, err := loadAccess(c.access)
	if err != nil {
		return nil, err
	}
	socket, tcp, err := c.addresses()
	if err != nil {
		return nil, err
	}
	// Before recovery, so that callers of a restarted daemon wait for it instead of being refused.
	if d.listener, d.socket, err = listen(socket, c.socketGroup); err != nil {
		return nil, err
	}
	d.onClose(d.closeListener)
	if err := d.listenTCP(c, tcp, log); err != nil {
		return nil, err
	}

	runtimes, warm, err := d.newRuntimes(c, log)
	if err != nil {
		return nil, err
	}
	images, err := image.Open(filepath.Join(c.stateDir, "images"), log.Named("image"))
	if err != nil {
		return nil, err
	}
	d.onClose(images.Close)

	networks, err := network.New(network.Config{
		ConfDir: c.cniConfDir, PluginDirs: c.cniPlugins, StateDir: c.stateDir, RunDir: c.runDir, Log: log.Named("network"),
	})
	if err != nil {
		return nil, err
	}

	probing, stopProbing := context.WithCancel(ctx)
	host := newHostFacts(probing, log, runtimes)
	d.onClose(func() error { stopProbing(); return nil })
	manager, err := workload.New(workload.Config{
		StateDir: c.stateDir, Log: log.Named("workload"),
		Images: images, Policy: rules, Runtimes: runtimes, Host: host.facts, Networks: networks, Admission: c.admissionBounds(),
		Templates: c.templates.sharing(), Snapshots: c.snapshots.limits(),
		Removed: func(w workload.Workload, err error) { server.AuditRemoved(trail, log.Named("server"), w, err) },
	})
	if err != nil {
		return nil, err
	}
	d.onClose(manager.Close)
	// It goes through all workloads, none of which may hold its lock for longer than an assignment.
	d.alive = func() { manager.Count() }
	if err := manager.Recover(ctx); err != nil {
		return nil, fmt.Errorf("cannot recover workloads: %w", err)
	}
	warm()
	// Not before: recovery removes every sandbox without a record, and a probe's trial is one. The first workload then
	// finds the answer ready, or waits for the rest of the look.
	var looking sync.WaitGroup
	looking.Go(func() { host.facts() })
	d.onClose(func() error { stopProbing(); looking.Wait(); return nil })

	counts, err := d.showMetrics(c.metrics, manager, trail, log.Named("metrics"))
	if err != nil {
		return nil, err
	}
	d.server, err = server.New(server.Config{
		Log: log.Named("server"), Workloads: manager, Images: images, Policy: rules, Runtimes: runtimes, NetworkChecks: networks.Checks,
		Access: roles, TLS: d.tls, Audit: trail, Metrics: counts,
		Host: server.Host{
			Version: spec.Version, Commit: spec.Commit, StateDir: c.stateDir, RunDir: c.runDir,
			Socket: d.socket, CgroupMode: cgroup.Mode(), PolicyFile: c.policy,
		},
	})
	return d, err
}

// closeListener: the server has closed it already, unless the start failed before.
func (d *daemon) closeListener() error {
	if err := d.listener.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
		return err
	}
	return nil
}

// listenTCP opens the addresses that callers with certificates come to.
func (d *daemon) listenTCP(c config, addresses []string, log *zap.Logger) (err error) {
	if len(addresses) == 0 {
		return nil
	}
	if d.tls, err = server.LoadTLS(c.tlsCert, c.tlsKey, c.tlsClientCA, log.Named("tls")); err != nil {
		return err
	}
	for _, a := range addresses {
		l, err := net.Listen("tcp", a)
		if err != nil {
			return fmt.Errorf("cannot listen: %w", err)
		}
		d.remote = append(d.remote, l)
		d.onClose(func() error {
			if err := l.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
				return err
			}
			return nil
		})
	}
	return nil
}

// reload reads the access file and the certificates again. What cannot be used changes nothing.
func (d *daemon) reload() error {
	var errs []error
	if d.config.access != "" {
		roles, err := loadAccess(d.config.access)
		if err == nil {
			d.server.SetAccess(roles)
		}
		errs = append(errs, err)
	}
	if d.tls != nil {
		errs = append(errs, d.tls.Reload())
	}
	return errors.Join(errs...)
}

// takeDirs makes the daemon's directories and claims those that two daemons must not share.
func (d *daemon) takeDirs(c config) error {
	for _, dir := range []struct {
		path  string
		alone bool
	}{
		{c.stateDir, true},
		{c.runDir, true},
		// Shared by design.
		{c.idDir, false},
	} {
		if err := makeDir(dir.path); err != nil {
			return err
		}
		if !dir.alone {
			continue
		}
		lock, err := lockDir(dir.path)
		if err != nil {
			return err
		}
		d.onClose(lock.Close)
	}
	return nil
}

// openTrace has the phases of sandboxes' lives written down, if that was asked for.
func (d *daemon) openTrace(path string) error {
	if path == "" {
		return nil
	}
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("cannot open trace: %w", err)
	}
	d.onClose(f.Close)
	phase.To(f)
	return nil
}

// noAudit in place of a path is for no audit log.
const noAudit = "none"

// openAudit is nil if there shall be no audit log.
func (d *daemon) openAudit(c config) (*audit.Log, error) {
	if c.auditLog == noAudit {
		return nil, nil
	}
	trail, err := audit.Open(audit.Config{
		Path:      cmp.Or(c.auditLog, filepath.Join(c.stateDir, "audit", "audit.log")),
		SizeBytes: int64(c.auditSize), Keep: c.auditKeep,
	})
	if err != nil {
		return nil, err
	}
	d.onClose(trail.Close)
	return trail, nil
}

func loadPolicy(path string) (*policy.Policy, error) {
	if path == "" {
		return policy.None(), nil
	}
	source, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read policy: %w", err)
	}
	return policy.Load(source, path)
}

// loadAccess: whoever can write the file can be anyone, so it must be root's alone. Nil without one.
func loadAccess(path string) (*access.Table, error) {
	if path == "" {
		return nil, nil
	}
	file, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("cannot read access file: %w", err)
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, fmt.Errorf("cannot read access file: %w", err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || st.Uid != 0 || info.Mode().Perm()&0o022 != 0 {
		return nil, fmt.Errorf("cannot use access file %s: only root may be able to write to it: run chown root %s && chmod go-w %s", path, path, path)
	}
	source, err := io.ReadAll(file)
	if err != nil {
		return nil, fmt.Errorf("cannot read access file: %w", err)
	}
	return access.Load(source, path)
}

// leaveNoEmptyCgroup removes the sandboxes' parent when the daemon ends, unless there are any.
func leaveNoEmptyCgroup(parent string) error {
	err := cgroup.RemoveParent(parent)
	if errors.Is(err, unix.EBUSY) || errors.Is(err, unix.ENOTEMPTY) {
		return nil
	}
	return err
}

// newRuntimes is where the daemon learns which walls there are. warm has them make sandboxes ahead of time, after recovery.
func (d *daemon) newRuntimes(c config, log *zap.Logger) (_ map[spec.Isolation]runtime.Runtime, warm func(), err error) {
	agent, err := program("agent", c.agent, "sandbox-agent")
	if err != nil {
		return nil, nil, err
	}
	helper, err := program("vsock-helper", c.vsockHelper, "sandbox-vsock")
	if err != nil {
		return nil, nil, err
	}
	ids, err := idrange.Open(c.idDir)
	if err != nil {
		return nil, nil, err
	}
	d.onClose(func() error { return leaveNoEmptyCgroup(c.cgroup) })
	disks := disk.NewMaker(filepath.Join(c.stateDir, "disk-templates"))
	if err := disks.RemoveUnfinished(); err != nil {
		return nil, nil, err
	}
	containers, err := container.New(container.Config{
		RunDir: c.runDir, StateDir: c.stateDir, CgroupParent: c.cgroup, Agent: agent,
		Logger: log.Named("container"), Disk: disks, IDs: ids,
		Pool: container.Pool{Size: c.agentPool, DiskBytes: workload.DefaultResources.DiskBytes},
	})
	if err != nil {
		return nil, nil, err
	}
	d.onClose(containers.Close)
	vms, err := microvm.New(microvm.Config{
		RunDir: c.runDir, StateDir: c.stateDir, CgroupParent: c.cgroup, Agent: agent,
		Logger: log.Named("microvm"), Disk: disks, IDs: ids,
		Kernel: c.vmKernel, Accel: c.vmAccel, KVMTrial: c.vmKVMTrial, VsockHelper: helper,
		Templates: c.templates.config(),
	})
	if err != nil {
		return nil, nil, err
	}
	d.onClose(vms.Close)
	return map[spec.Isolation]runtime.Runtime{
		spec.IsolationContainer: containers,
		spec.IsolationVM:        vms,
	}, containers.Warm, nil
}
