package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"time"

	"github.com/containernetworking/cni/libcni"
	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

const (
	// ifName is a sandbox's interface, as every container runtime calls it.
	ifName = "eth0"
	// defaultTimeout bounds all plugins of one ADD or DEL together. A bridge takes 50 ms; a lease from a slow DHCP server,
	// seconds. Both must fit into what the manager gives a start and a teardown.
	defaultTimeout = 40 * time.Second
)

// Config is what a Manager works with. Every field but Log and the times must be set.
type Config struct {
	// Where the operator keeps conflists, and the plugins they name.
	ConfDir    string
	PluginDirs []string
	// Records lie below StateDir/network, pins below RunDir/netns.
	StateDir, RunDir string
	Log              *zap.Logger
	// Of all plugins of one ADD or DEL; 0 means a default.
	Timeout time.Duration
	// How long plugins of a daemon that died may go on; 0 means a default.
	OrphanGrace time.Duration
}

// Manager joins sandboxes to networks. Its methods may be called concurrently for different ids; for one id the caller makes
// one call at a time.
type Manager struct {
	cfg        Config
	state, run string
}

// New makes the directories it needs and touches nothing else.
func New(c Config) (*Manager, error) {
	if c.ConfDir == "" || len(c.PluginDirs) == 0 || c.StateDir == "" || c.RunDir == "" {
		return nil, errors.New("cannot make a network manager: a directory is not set")
	}
	if c.Log == nil {
		c.Log = zap.NewNop()
	}
	if c.Timeout == 0 {
		c.Timeout = defaultTimeout
	}
	if c.OrphanGrace == 0 {
		c.OrphanGrace = orphanGrace
	}
	m := &Manager{cfg: c, state: filepath.Join(c.StateDir, "network"), run: filepath.Join(c.RunDir, "netns")}
	for _, dir := range []string{m.state, m.run} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("cannot make a network manager: %w", err)
		}
	}
	return m, nil
}

// Check answers KindInvalid for a network that there is not, naming those that there are, and another error for one that
// cannot be used.
func (m *Manager) Check(name string) error {
	_, err := m.find(name)
	return err
}

func (m *Manager) find(name string) (*libcni.NetworkConfigList, error) {
	confs, err := readConfs(m.cfg.ConfDir)
	if err != nil {
		return nil, err
	}
	for _, c := range confs {
		if c.list == nil || c.name() != name {
			continue
		}
		for _, p := range pluginsOf(c.list) {
			if _, err := findPlugin(p, m.cfg.PluginDirs); err != nil {
				return nil, fmt.Errorf("cannot use network %q: %w", name, err)
			}
		}
		return c.list, nil
	}
	known := names(confs)
	if known == "" {
		return nil, spec.Invalidf("spec.network", "no network %q: %s has no usable conflist, so there is only none (`sandboxctl doctor` says more)", clip(name), m.cfg.ConfDir)
	}
	return nil, spec.Invalidf("spec.network", "no network %q: choose one of none, %s (`sandboxctl doctor` says more)", clip(name), known)
}

// idPattern is what an id of a sandbox must be; it becomes part of paths.
var idPattern = regexp.MustCompile(`^[0-9a-f]{32}$`)

func (m *Manager) dir(id string) string { return filepath.Join(m.state, id) }
func (m *Manager) pin(id string) string { return filepath.Join(m.run, id) }

// Attach joins the sandbox that has the namespace netns to a network. If it fails, nothing of it is left, or a Detach that
// has not been able to remove it yet will find it.
func (m *Manager) Attach(ctx context.Context, id, name string, netns *os.File) (spec.Network, error) {
	if !idPattern.MatchString(id) {
		return spec.Network{}, spec.Errorf(spec.KindInternal, "cannot join sandbox %q to a network: it has no valid id", id)
	}
	list, err := m.find(name)
	if err != nil {
		return spec.Network{}, err
	}
	joined, err := m.attach(ctx, id, list, netns)
	if err != nil {
		err = fmt.Errorf("cannot join network %q: %w", name, err)
		// Not ctx: that it has ended may be why.
		return spec.Network{}, errors.Join(err, m.Detach(context.WithoutCancel(ctx), id))
	}
	return joined, nil
}

func (m *Manager) attach(ctx context.Context, id string, list *libcni.NetworkConfigList, netns *os.File) (spec.Network, error) {
	dir := m.dir(id)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return spec.Network{}, fmt.Errorf("what an earlier start left was not removed: %w", err)
	}
	if err := wholefile.SyncDir(m.state); err != nil {
		return spec.Network{}, err
	}
	fault.At("network", "directory made")
	rec := record{Network: list.Name, Conflist: list.Bytes, PluginDirs: m.cfg.PluginDirs}
	if err := writeRecord(dir, rec); err != nil {
		return spec.Network{}, err
	}
	fault.At("network", "recorded")
	lock, err := takeLock(ctx, dir, m.cfg.OrphanGrace)
	if err != nil {
		return spec.Network{}, err
	}
	defer lock.Close() // plugins that still run have it too
	if err := pin(netns, m.pin(id)); err != nil {
		return spec.Network{}, err
	}
	fault.At("network", "pinned")
	limited, cancel := context.WithTimeout(ctx, m.cfg.Timeout)
	defer cancel()
	result, err := m.cni(rec, dir, lock).AddNetworkList(limited, list, runtimeConf(id, m.pin(id)))
	if err != nil {
		return spec.Network{}, err
	}
	fault.At("network", "added")
	joined, err := look(netns)
	if err != nil {
		return spec.Network{}, err
	}
	joined.Name = list.Name
	if joined.DNS, err = dnsOf(result); err != nil {
		return spec.Network{}, err
	}
	rec.Joined = &joined
	err = writeRecord(dir, rec)
	fault.At("network", "result recorded")
	return joined, err
}

func runtimeConf(id, netns string) *libcni.RuntimeConf {
	return &libcni.RuntimeConf{ContainerID: id, NetNS: netns, IfName: ifName}
}

// cni is libcni as one workload needs it: its results lie beside the workload's record.
func (m *Manager) cni(rec record, dir string, lock *os.File) *libcni.CNIConfig {
	return libcni.NewCNIConfigWithCacheDir(rec.PluginDirs, dir, &pluginExec{lock: lock})
}

// Detach takes back whatever an Attach did, however far it came, and is silent about an id that has nothing. The sandbox must
// have ended: its address may be another's from now on.
func (m *Manager) Detach(ctx context.Context, id string) error {
	if !idPattern.MatchString(id) {
		return spec.Errorf(spec.KindInternal, "cannot leave the network of sandbox %q: it has no valid id", id)
	}
	dir := m.dir(id)
	rec, err := readRecord(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// Died before the record was written, or after it was removed: no plugin has run, or all are done.
	case err != nil:
		return fmt.Errorf("cannot leave the network of sandbox %s: %w", id, err)
	default:
		if err := m.del(ctx, id, rec); err != nil {
			return fmt.Errorf("cannot leave network %q: %w", rec.Network, err)
		}
		fault.At("network", "deleted")
	}
	if err := unpin(m.pin(id)); err != nil {
		return err
	}
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	fault.At("network", "unpinned")
	return removeRecord(dir)
}

func (m *Manager) del(ctx context.Context, id string, rec record) error {
	dir := m.dir(id)
	ctx, cancel := context.WithTimeout(ctx, m.cfg.Timeout+m.cfg.OrphanGrace+orphanEnd)
	defer cancel()
	lock, err := takeLock(ctx, dir, m.cfg.OrphanGrace)
	if err != nil {
		return err
	}
	defer lock.Close() // nothing was written
	ctx, cancel = context.WithTimeout(ctx, m.cfg.Timeout)
	defer cancel()
	list, err := parseConf(rec.Conflist)
	if err != nil {
		return fmt.Errorf("its recorded conflist is not usable: %w", err)
	}
	netns := m.pin(id)
	held, err := pinned(netns)
	if err != nil {
		return err
	}
	if !held {
		netns = "" // CNI's way to say that it is gone
	} else if err := m.ready(ctx, netns, dir, rec); err != nil {
		return err
	}
	conf, cni := runtimeConf(id, netns), m.cni(rec, dir, lock)
	if _, err := cni.GetNetworkListCachedResult(list, conf); err != nil {
		// Half a file, of a host that lost power: without a result plugins go by the container's id.
		m.cfg.Log.Warn("cannot read the result of a network's plugins; going on without", zap.String("sandbox", id), zap.Error(err))
		if err := os.RemoveAll(filepath.Join(dir, "results")); err != nil {
			return err
		}
	}
	return cni.DelNetworkList(ctx, list, conf)
}

// ready has DEL find the interface as ADD left it, once: what a DEL that began has taken away is not to come back, for plugins then
// look for rules that are gone.
func (m *Manager) ready(ctx context.Context, netns, dir string, rec record) error {
	if rec.Joined == nil || rec.Leaving {
		return nil
	}
	if err := restore(ctx, netns, *rec.Joined); err != nil {
		return err
	}
	rec.Leaving = true
	return writeRecord(dir, rec)
}

// List names every sandbox of which a network has something, so that recovery finds what no record of a workload speaks of.
func (m *Manager) List() ([]string, error) {
	var ids []string
	for _, dir := range []string{m.state, m.run} {
		entries, err := os.ReadDir(dir)
		if err != nil {
			return nil, fmt.Errorf("cannot list joined sandboxes: %w", err)
		}
		for _, e := range entries {
			if idPattern.MatchString(e.Name()) {
				ids = append(ids, e.Name())
			}
		}
	}
	slices.Sort(ids)
	return slices.Compact(ids), nil
}
