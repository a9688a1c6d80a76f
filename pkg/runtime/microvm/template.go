package microvm

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/bootid"
	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/wholefile"
)

// A template is a guest that was stopped when its agent had come up and before it was told who it is: its memory in a
// sealed file that every clone maps and copies what it writes of, and the state of its devices and processors. It holds no
// secret: it had no token, no random numbers but its kernel's own, and nothing of a workload.
//
//	StateDir/microvm/templates/<key>/     0700
//	    memory     holes where the guest's is zero
//	    state      what QEMU writes when it migrates
//	    meta.json  written last: what is in the others, with their sums
//
// A daemon loads one into sealed memory at its first use, comparing the sums.

const (
	templatesDir = "templates"
	metaFile     = "meta.json"
	memoryFile   = "memory"
	stateFile    = "state"
	// templateFormat changes when what a template is made of does.
	templateFormat = 1
	// maxTemplateState bounds a state: seen 100 KiB.
	maxTemplateState = 64 << 20
	// Bounds if the configuration has none.
	defaultTemplates     = 8
	defaultTemplateBytes = 4 << 30
	// shortKey is how much of a key people see.
	shortKey = 12
)

// TemplateConfig says whether and how many templates are kept.
type TemplateConfig struct {
	// Make and use them.
	On bool
	// How many there are at most, and of how many bytes of guest memory altogether; 0 for 8 and 4 GiB.
	Max      int
	MaxBytes uint64
	// How long after a boot a template is made of it; 0 for defaultTemplateDelay.
	Delay time.Duration
	// Clones that wait.
	Pool PoolConfig
}

// templateKey names a template by everything that it depends on.
type templateKey string

func (k templateKey) short() string { return string(k[:min(len(k), shortKey)]) }

// templateMeta is what is known of a template.
type templateMeta struct {
	Format int         `json:"format"`
	Key    templateKey `json:"key"`
	// Everything of the key that is the host's and not the workload's: other templates of the same host have the same.
	Environment string `json:"environment"`
	// Path of the image's file.
	Image string `json:"image"`
	// Who may use it: see spec.Sandbox.
	Scope       string    `json:"scope,omitempty"`
	CPUs        uint32    `json:"cpus"`
	MemoryBytes uint64    `json:"memoryBytes"`
	Accelerator string    `json:"accelerator"`
	Transport   string    `json:"transport"`
	Made        time.Time `json:"made"`
	MemorySum   string    `json:"memorySum"`
	StateSum    string    `json:"stateSum"`
}

// template is one that is loaded. Those who use it hold it: dropped, it stays until the last has let go.
type template struct {
	meta   templateMeta
	memory *os.File
	state  *os.File

	mu   sync.Mutex
	held int // guarded by mu: one for the store
}

func (t *template) hold() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.held++
}

func (t *template) release() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.held--; t.held == 0 {
		_ = errors.Join(t.memory.Close(), t.state.Close()) // in memory; clones that run have it mapped
	}
}

// sharedBytes is what a clone's cgroup may be charged for beyond the clone's own memory: whoever first touches a page that
// the template has not pays for the template's, too. No template, nothing.
func (t *template) sharedBytes() uint64 {
	if t == nil {
		return 0
	}
	var st unix.Stat_t
	if err := unix.Fstat(int(t.memory.Fd()), &st); err != nil {
		return t.meta.MemoryBytes
	}
	return t.meta.MemoryBytes - min(t.meta.MemoryBytes, uint64(st.Blocks)*512)
}

// keyParts are a key's, in two: what is the host's, and what is the workload's.
type keyParts struct {
	Format    int
	Boot      string
	Kernel    string
	Initramfs string
	QEMU      string
	Arguments []string
	Image     string
	ImageSize int64
	ImageTime int64
	Scope     string
}

// templateKey is the name of the template that s would be cloned from.
func (r *Runtime) templateKey(s spec.Sandbox, g *guest, accel string) (templateKey, error) {
	parts, err := r.keyParts(s, g, accel)
	return templateKey(hashOf(parts)), err
}

func (r *Runtime) keyParts(s spec.Sandbox, g *guest, accel string) (keyParts, error) {
	parts, err := r.environment(g)
	if err != nil {
		return parts, err
	}
	image, err := os.Stat(s.ImagePath)
	if err != nil {
		return parts, fmt.Errorf("cannot examine the image: %w", err)
	}
	parts.Image, parts.ImageSize, parts.ImageTime = s.ImagePath, image.Size(), image.ModTime().UnixNano()
	parts.Scope = s.TemplateScope
	path, err := r.qemuPath()
	if err != nil {
		return parts, err
	}
	// The command line of such a template, numbers of descriptors and the like being any.
	parts.Arguments = vmArgs{
		Accelerator: accel, CPUs: vcpus(s.Resources.CPUMillis), MemoryBytes: guestBytes(s.Resources), Firmware: firmware(path),
		Transport: r.templateTransport(), Image: 1, BlankDisk: true, Memory: 1, MemoryShared: true, Verbose: r.cfg.GuestConsole,
		Tap: networkCards(s),
	}.argv()
	return parts, nil
}

// networkCards is how many a guest has. Which network it is in does not matter to a template: its card leads nowhere.
func networkCards(s spec.Sandbox) int {
	if spec.Joins(s.Network) {
		return 1
	}
	return 0
}

func (r *Runtime) templateTransport() string {
	if r.hub != nil {
		return transportKernel
	}
	return transportPort
}

// environment is the host's part of a key. A boot of the host belongs to it: what a guest knows of its processor and
// clock is of that boot.
func (r *Runtime) environment(g *guest) (keyParts, error) {
	boot, err := bootid.Host()
	if err != nil {
		return keyParts{}, err
	}
	path, err := r.qemuPath()
	if err != nil {
		return keyParts{}, err
	}
	qemu, err := os.Stat(path)
	if err != nil {
		return keyParts{}, fmt.Errorf("cannot examine QEMU: %w", err)
	}
	return keyParts{
		Format: templateFormat, Boot: boot, Kernel: g.kernelHash,
		// Named by its content, the agent's and the modules'.
		Initramfs: filepath.Base(g.initramfsPath),
		QEMU:      fmt.Sprintf("%s %d %d", path, qemu.Size(), qemu.ModTime().UnixNano()),
	}, nil
}

func hashOf(p keyParts) string {
	b, _ := json.Marshal(p) // plain values
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// templateStore is the templates of one daemon.
type templateStore struct {
	dir    string
	config TemplateConfig
	log    *zap.Logger

	// Called with the key of each template that is dropped or replaced, with mu held.
	dropped func(templateKey)

	// Held while a template is made: one at a time.
	making sync.Mutex

	mu sync.Mutex
	// Every template there is; not loaded where the template is nil. Guarded by mu, as is what follows.
	known map[templateKey]*templateEntry
	// Those that are wanted, and when those could not be made that could not: they are not tried again for templateRetry.
	wanted map[templateKey]bool
	failed map[templateKey]time.Time
}

type templateEntry struct {
	meta   templateMeta
	loaded *template
	used   time.Time
	// How many clones were made since the daemon began.
	clones int
}

// openTemplates finds the templates of earlier daemons. Nobody else may use dir.
func openTemplates(dir string, config TemplateConfig, log *zap.Logger) (*templateStore, error) {
	config.Max = cmp.Or(config.Max, defaultTemplates)
	config.MaxBytes = cmp.Or(config.MaxBytes, defaultTemplateBytes)
	config.Delay = cmp.Or(config.Delay, defaultTemplateDelay)
	s := &templateStore{
		dir: dir, config: config, log: log,
		dropped: func(templateKey) {},
		known:   map[templateKey]*templateEntry{}, wanted: map[templateKey]bool{}, failed: map[templateKey]time.Time{},
	}
	if err := makePrivateDir(dir); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("cannot list templates: %w", err)
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		meta, err := readTemplateMeta(path)
		if err != nil || string(meta.Key) != e.Name() || meta.Format != templateFormat {
			// Half made, or of another version.
			if err := os.RemoveAll(path); err != nil {
				return nil, fmt.Errorf("cannot remove a template: %w", err)
			}
			continue
		}
		s.known[meta.Key] = &templateEntry{meta: meta, used: meta.Made}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s, s.evictLocked(0, 0)
}

func readTemplateMeta(dir string) (templateMeta, error) {
	var meta templateMeta
	b, err := wholefile.Read(filepath.Join(dir, metaFile), maxRecord)
	if err == nil {
		err = json.Unmarshal(b, &meta)
	}
	return meta, err
}

// find answers with the template for key, held, loading it if need be; nil if there is none, and why if there was one.
func (s *templateStore) find(key templateKey) (t *template, note string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.known[key]
	if e == nil {
		return nil, ""
	}
	if e.loaded == nil {
		loaded, err := loadTemplate(filepath.Join(s.dir, string(key)), e.meta)
		if err != nil {
			note := fmt.Sprintf("template %s can't be used: %v", key.short(), err)
			s.dropLocked(key)
			return nil, note
		}
		e.loaded = loaded
	}
	e.used = time.Now()
	e.clones++
	e.loaded.hold()
	return e.loaded, ""
}

// current answers with the template for key, held, if it is loaded: nobody is waited for.
func (s *templateStore) current(key templateKey) *template {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.known[key]
	if e == nil || e.loaded == nil {
		return nil
	}
	e.loaded.hold()
	return e.loaded
}

// note counts a clone that was made ahead of time, now that it is used.
func (s *templateStore) note(key templateKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.known[key]; e != nil {
		e.used = time.Now()
		e.clones++
	}
}

// add takes t over, making room for it, and keeps it below the state directory.
func (s *templateStore) add(t *template) error {
	if err := saveTemplate(s.dir, t); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if old := s.known[t.meta.Key]; old != nil && old.loaded != nil {
		old.loaded.release()
	}
	s.dropped(t.meta.Key)
	t.held = 1
	s.known[t.meta.Key] = &templateEntry{meta: t.meta, loaded: t, used: time.Now()}
	delete(s.failed, t.meta.Key)
	return s.evictLocked(0, 0)
}

// evictLocked drops what was not used for longest until there is room for more.
func (s *templateStore) evictLocked(count int, bytes uint64) error {
	keys := s.keysLocked()
	for _, e := range s.known {
		bytes += e.meta.MemoryBytes
	}
	for count += len(keys); len(keys) > 0 && (count > s.config.Max || bytes > s.config.MaxBytes); count-- {
		key := keys[0]
		keys = keys[1:]
		bytes -= s.known[key].meta.MemoryBytes
		if err := s.dropLocked(key); err != nil {
			return err
		}
	}
	return nil
}

// keysLocked are all keys, that of the template that was not used for longest first.
func (s *templateStore) keysLocked() []templateKey {
	var keys []templateKey
	for key := range s.known {
		keys = append(keys, key)
	}
	slices.SortFunc(keys, func(a, b templateKey) int { return s.known[a].used.Compare(s.known[b].used) })
	return keys
}

// drop forgets a template. Clones of it run on.
func (s *templateStore) drop(key templateKey) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.dropLocked(key)
}

func (s *templateStore) dropLocked(key templateKey) error {
	e := s.known[key]
	if e == nil {
		return nil
	}
	delete(s.known, key)
	s.dropped(key)
	if e.loaded != nil {
		e.loaded.release()
	}
	// meta.json first: without it the rest is nothing.
	dir := filepath.Join(s.dir, string(key))
	if err := os.Remove(filepath.Join(dir, metaFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		s.log.Error("cannot remove a template", zap.String("template", key.short()), zap.Error(err))
		return fmt.Errorf("cannot remove template %s: %w", key.short(), err)
	}
	if err := os.RemoveAll(dir); err != nil {
		s.log.Error("cannot remove a template", zap.String("template", key.short()), zap.Error(err))
		return fmt.Errorf("cannot remove template %s: %w", key.short(), err)
	}
	return nil
}

// sweep drops the templates of another kernel, agent, QEMU or boot of the host, and of images that were removed: nothing will
// ever ask for them.
func (s *templateStore) sweep(environment string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, key := range s.keysLocked() {
		meta := s.known[key].meta
		if _, err := os.Stat(meta.Image); meta.Environment == environment && !errors.Is(err, fs.ErrNotExist) {
			continue
		}
		s.log.Info("a template is out of date: its kernel, agent, image or QEMU was replaced, or the host booted", zap.String("template", key.short()))
		if err := s.dropLocked(key); err != nil {
			return err
		}
	}
	return nil
}

// close lets go of what is loaded. The files stay.
func (s *templateStore) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.known {
		if e.loaded != nil {
			e.loaded.release()
			e.loaded = nil
		}
	}
}
