package workload

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/image"
	"github.com/sandboxd/sandboxd/pkg/policy"
	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Images is what the manager needs of an image store.
type Images interface {
	// Get finds an image by name or digest; KindNotFound if there is none.
	Get(ref string) (image.Image, error)
}

// Networks joins sandboxes to networks.
type Networks interface {
	// Check answers KindInvalid for a network that there is not, naming those that there are.
	Check(name string) error
	// Attach joins the sandbox that has the namespace netns. What it makes is durable before it is made, for Detach.
	Attach(ctx context.Context, id, name string, netns *os.File) (spec.Network, error)
	// Detach takes back whatever an Attach did, however far it came; silent about an id that has nothing. Not before the
	// sandbox has ended: its address may be another's from then on.
	Detach(ctx context.Context, id string) error
	// List names every id of which something is there.
	List() ([]string, error)
}

// Config is what a Manager is made of.
type Config struct {
	// Records and output live below StateDir/workloads.
	StateDir string
	Log      *zap.Logger
	Images   Images
	Policy   *policy.Policy
	Runtimes map[spec.Isolation]runtime.Runtime
	// Host is asked at each decision what the host can give.
	Host     func() policy.Host
	Networks Networks
	// What a workload gets that does not say; fields left zero are DefaultResources'.
	Defaults spec.Resources
	// What they may hold together.
	Admission Admission
	// Removed, unless nil, is told of a workload that was removed at its end by another daemon than was asked to: no call is
	// there any more that would tell of it.
	Removed func(Workload, error)
	// What snapshots may take together.
	Snapshots SnapshotLimits
	// Whose VMs may share templates; the zero value: those of one caller.
	Templates TemplateSharing
}

// DefaultResources are what a workload gets that does not ask, unless the operator says otherwise.
var DefaultResources = spec.Resources{
	CPUMillis:   1000,
	MemoryBytes: 512 << 20,
	Pids:        512,
	DiskBytes:   2 << 30,
	LogBytes:    128 << 20,
}

// Manager owns every workload of a daemon. Workloads are named by id, by an unambiguous prefix of it of at least four
// digits, or by name; ref stands for any of these.
//
// Lock order: entry.op, Manager.admitting, run.stillMu, Manager.mu, entry.logMu, entry.mu. entry.op is held for the length of a verb that builds or takes down walls.
type Manager struct {
	cfg   Config
	dir   string
	store *store
	// Have a lock of their own, which nothing else is taken under.
	snapshots *snapshotStore
	events    *eventRing
	// Ends with Close: everything that waits gives up, nothing of any sandbox is touched.
	ctx    context.Context
	cancel context.CancelFunc
	owned  sync.WaitGroup // supervisors, starts and deletions

	mu     sync.Mutex // guards what follows, and entry.ready
	byID   map[string]*entry
	byName map[string]*entry
	// Of creations with an idempotency key, and of those under way.
	byKey    map[onceID]*entry
	creating map[onceID]chan struct{}
	// How many workloads each caller has.
	ofCaller map[string]int

	admitting sync.Mutex // held from the look at what is committed until more is; taken before mu
}

var errClosing = spec.Errorf(spec.KindUnavailable, "sandboxd is shutting down: call again when it is back")

// New opens the records below cfg.StateDir. Call Recover before anything else.
func New(cfg Config) (*Manager, error) {
	cfg.Defaults = withDefaults(cfg.Defaults, DefaultResources)
	dir := filepath.Join(cfg.StateDir, "workloads")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make state directory: %w", err)
	}
	st, err := openStore(dir)
	if err != nil {
		return nil, err
	}
	snapshots, err := openSnapshots(filepath.Join(cfg.StateDir, "snapshots"), cfg.Log)
	if err != nil {
		st.close()
		return nil, err
	}
	m := &Manager{
		snapshots: snapshots,
		cfg:       cfg, dir: dir, store: st, events: newEventRing(),
		byID: map[string]*entry{}, byName: map[string]*entry{}, byKey: map[onceID]*entry{}, creating: map[onceID]chan struct{}{}, ofCaller: map[string]int{},
	}
	m.ctx, m.cancel = context.WithCancel(context.Background())
	records, err := st.all()
	if err != nil {
		st.close()
		return nil, err
	}
	for _, r := range records {
		e := newEntry(m, r)
		e.ready = true
		m.addLocked(e)
	}
	return m, nil
}

func withDefaults(r, d spec.Resources) spec.Resources {
	r.CPUMillis = cmp.Or(r.CPUMillis, d.CPUMillis)
	r.MemoryBytes = cmp.Or(r.MemoryBytes, d.MemoryBytes)
	r.Pids = cmp.Or(r.Pids, d.Pids)
	r.DiskBytes = cmp.Or(r.DiskBytes, d.DiskBytes)
	r.LogBytes = cmp.Or(r.LogBytes, d.LogBytes)
	return r
}

// Close lets go of every workload without touching it and closes the records. The sandboxes run on.
func (m *Manager) Close() error {
	m.cancel()
	m.owned.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range m.byID {
		e.closeLog()
	}
	return m.store.close()
}

func (m *Manager) addLocked(e *entry) {
	m.byID[e.id] = e
	m.byName[e.name] = e
	m.ofCaller[e.caller]++
	if e.once != nil {
		m.byKey[e.onceID] = e
	}
}

func (m *Manager) forget(e *entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.byID[e.id] == e {
		if m.ofCaller[e.caller]--; m.ofCaller[e.caller] == 0 {
			delete(m.ofCaller, e.caller)
		}
	}
	delete(m.byID, e.id)
	if m.byName[e.name] == e {
		delete(m.byName, e.name)
	}
	if e.once != nil && m.byKey[e.onceID] == e {
		delete(m.byKey, e.onceID)
	}
}

// has reports whether e is still a workload of this daemon.
func (m *Manager) has(e *entry) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.byID[e.id] == e
}

// minPrefix is how many digits of an id are needed to mean it.
const minPrefix = 4

func (m *Manager) find(ref string) (*entry, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, by := range []map[string]*entry{m.byID, m.byName} {
		if e := by[ref]; e != nil && e.ready {
			return e, nil
		}
	}
	var found *entry
	if len(ref) >= minPrefix {
		for id, e := range m.byID {
			if !strings.HasPrefix(id, ref) || !e.ready {
				continue
			}
			if found != nil {
				return nil, spec.Invalidf("id", "%q is the beginning of more than one workload's id: give more digits", ref)
			}
			found = e
		}
	}
	if found == nil {
		return nil, NotFound(ref)
	}
	return found, nil
}

// NotFound is what a ref that names no workload is answered with, and one that names a workload its caller may not see.
func NotFound(ref string) error {
	return spec.Errorf(spec.KindNotFound, "no workload %q: `sandboxctl ps -a` lists them", ref)
}

func (m *Manager) Get(ref string) (Workload, error) {
	e, err := m.find(ref)
	if err != nil {
		return Workload{}, err
	}
	return e.workload(), nil
}

// Filter selects workloads; the zero value selects all.
type Filter struct {
	// Every pair must match; an empty value matches any.
	Labels    map[string]string
	States    []State
	Isolation spec.Isolation
	// Whether the caller may see it; nil for all.
	Visible func(Workload) bool
}

func (f Filter) match(w Workload) bool {
	for k, v := range f.Labels {
		if got, ok := w.Labels[k]; !ok || v != "" && got != v {
			return false
		}
	}
	return (len(f.States) == 0 || slices.Contains(f.States, w.Status.State)) &&
		(f.Isolation == "" || f.Isolation == w.Status.Isolation) &&
		(f.Visible == nil || f.Visible(w))
}

// List answers with at most size workloads, oldest first, and the token of the next page.
func (m *Manager) List(f Filter, size int, token string) ([]Workload, string, error) {
	entries := m.entries()
	slices.SortFunc(entries, func(a, b *entry) int { return strings.Compare(a.pageKey(), b.pageKey()) })
	if token != "" {
		i, found := slices.BinarySearchFunc(entries, token, func(e *entry, t string) int { return strings.Compare(e.pageKey(), t) })
		if found {
			i++
		}
		entries = entries[i:]
	}
	var out []Workload
	last := ""
	for _, e := range entries {
		w := e.workload()
		if !f.match(w) {
			continue
		}
		if len(out) == size {
			return out, last, nil
		}
		out, last = append(out, w), e.pageKey()
	}
	return out, "", nil
}

// ImageInUse reports whether a workload or a snapshot uses the image of a digest.
func (m *Manager) ImageInUse(digest string) bool {
	if m.snapshots.uses(digest) {
		return true
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, e := range m.byID {
		if e.digest == digest {
			return true
		}
	}
	return false
}

// entries are all workloads.
func (m *Manager) entries() []*entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*entry, 0, len(m.byID))
	for _, e := range m.byID {
		if e.ready {
			out = append(out, e)
		}
	}
	return out
}
