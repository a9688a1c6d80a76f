// Package image keeps the images that sandboxes are made of: each one read-only EROFS file named by its digest, which a
// container mounts and a VM gets as a drive. Images come from archives and registries; both are hostile input, bounded in
// every dimension and checked against every digest they are known by.
package image

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"go.uber.org/zap"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Image is one image of a store.
type Image struct {
	// sha256:… of the image's manifest; of the archive as it came for a plain root file system.
	Digest string
	// Canonical, sorted: docker.io/library/debian:12. None for an image whose last name was given to another.
	Names []string
	// Of the EROFS file.
	SizeBytes int64
	// When the image was built, by its own account; when it was imported, if it doesn't say.
	CreatedAt time.Time
	// linux/amd64
	Platform string
	Config   spec.ImageConfig
	// The EROFS file. It never changes, and stays while the image does.
	Path string
}

// Store keeps images in a directory:
//
//	images.db  names and what is known of each image (bbolt)
//	erofs/     one file per image, mode 0444: sha256-<hex>.erofs
//	known/     what images.db says of each image, to make it anew from: sha256-<hex>.json
//	tmp/       what is being made; emptied by Open
//
// An image is in the store when images.db says so, which is written last. A file without a record is what a kill left, and
// Open removes it. One process at a time has a store open.
type Store struct {
	dir    string
	log    *zap.Logger
	limits limits

	// mu guards what a name or a digest stands for: records and files change together under it.
	mu      sync.Mutex
	records *records

	// One import per digest at a time: the second finds the first's image.
	digests keyedLocks
	// Held by the one import that has a tree in memory (limits.memory) and writes its file. See importer.enter.
	building chan struct{}

	// ctx ends imports under way when the store is closed; using counts them.
	ctx   context.Context
	close context.CancelCauseFunc
	using sync.WaitGroup
}

var errClosed = spec.Errorf(spec.KindUnavailable, "the image store is closed: the daemon is stopping")

const (
	erofsDir = "erofs"
	tmpDir   = "tmp"
)

// Open opens the store in dir, making it if need be, and clears away what a killed daemon left half done.
func Open(dir string, log *zap.Logger) (*Store, error) {
	if log == nil {
		log = zap.NewNop()
	}
	for _, d := range []string{dir, filepath.Join(dir, erofsDir), filepath.Join(dir, knownDir), filepath.Join(dir, tmpDir)} {
		if err := makeDir(d); err != nil {
			return nil, fmt.Errorf("cannot open the image store: %w", err)
		}
	}
	records, err := openRecords(dir, log)
	if err != nil {
		return nil, fmt.Errorf("cannot open the image store: %w", err)
	}
	s := &Store{dir: dir, log: log, limits: defaultLimits, records: records, building: make(chan struct{}, 1)}
	s.ctx, s.close = context.WithCancelCause(context.Background())
	if err := s.clean(); err != nil {
		records.close()
		return nil, fmt.Errorf("cannot clean the image store: %w", err)
	}
	return s, nil
}

// makeDir makes a directory that only its owner may enter, and refuses one that another user could have put there.
func makeDir(dir string) error {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	info, err := os.Lstat(dir)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return fmt.Errorf("%s is not a directory", dir)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); !ok || int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to another user", dir)
	}
	return os.Chmod(dir, 0o700)
}

// clean makes files and records agree: only a kill, or hands that are not ours, make them differ.
func (s *Store) clean() error {
	leftovers, err := os.ReadDir(filepath.Join(s.dir, tmpDir))
	if err != nil {
		return err
	}
	for _, e := range leftovers {
		if err := os.Remove(filepath.Join(s.dir, tmpDir, e.Name())); err != nil {
			return err
		}
	}
	known, err := s.records.all()
	if err != nil {
		return err
	}
	files, err := os.ReadDir(filepath.Join(s.dir, erofsDir))
	if err != nil {
		return err
	}
	copies, err := damagedRecords(s.dir)
	if err != nil {
		return err
	}
	there := map[string]bool{}
	for _, e := range files {
		digest, err := digestOfFile(e.Name())
		if _, ok := known[digest]; ok && err == nil {
			there[digest] = true
			continue
		}
		if len(copies) > 0 {
			s.log.Warn("keeping an image file without a record: it may be of an image whose record is lost; import the image again, or remove the copies of the damaged records, and start sandboxd again",
				zap.String("file", e.Name()), zap.Strings("copies", copies))
			continue
		}
		s.log.Info("removing an image file that was never finished", zap.String("file", e.Name()))
		if err := os.Remove(filepath.Join(s.dir, erofsDir, e.Name())); err != nil {
			return err
		}
	}
	for digest := range known {
		if !there[digest] {
			s.log.Warn("forgetting an image whose file is gone", zap.String("digest", digest))
			if err := s.records.remove(digest); err != nil {
				return err
			}
		}
	}
	return nil
}

// closeWait is how long Close waits for imports to notice: they look between reads.
const closeWait = 10 * time.Second

// Close ends imports under way and closes the store.
func (s *Store) Close() error {
	s.close(errClosed)
	ended := make(chan struct{})
	go func() {
		s.using.Wait()
		close(ended)
	}()
	select {
	case <-ended:
	case <-time.After(closeWait):
		s.log.Warn("closing the image store under an import whose reader does not return")
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.records.close()
}

// use starts an operation that may take long: its context ends with ctx or the store. The caller calls done.
func (s *Store) use(ctx context.Context) (_ context.Context, done func(), _ error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil {
		return nil, nil, errClosed
	}
	s.using.Add(1)
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.ctx, func() { cancel(errClosed) })
	return ctx, func() {
		stop()
		cancel(nil)
		s.using.Done()
	}, nil
}

// Get finds an image by name, by digest, or by at least six digits of its digest that no other image's has.
func (s *Store) Get(ref string) (Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	digest, _, err := s.findLocked(ref)
	if err != nil {
		return Image{}, err
	}
	return s.imageLocked(digest)
}

// findLocked gives the digest ref stands for, and the canonical name if it is one.
func (s *Store) findLocked(ref string) (digest, name string, err error) {
	notFound := spec.Errorf(spec.KindNotFound, "no image %s: import or pull it first", quote(ref))
	if canonical, err := canonicalName(ref); err == nil {
		digest, err := s.records.lookup(canonical)
		if err != nil || digest != "" {
			return digest, canonical, err
		}
		if digest, err := s.byRepositoryDigestLocked(canonical); err != nil || digest != "" {
			return digest, canonical, err
		}
	}
	digits := digestDigits(ref)
	if digits == "" {
		return "", "", notFound
	}
	matches, err := s.records.withPrefix(digestPrefix + digits)
	switch {
	case err != nil:
		return "", "", err
	case len(matches) == 0:
		return "", "", notFound
	case len(matches) > 1:
		return "", "", spec.Invalidf("reference", "%s stands for %d images: give more digits", quote(ref), len(matches))
	}
	return matches[0], "", nil
}

// byRepositoryDigestLocked finds debian@sha256:… where the image was pulled by tag: its digest must fit, and one of its
// names must be of that repository.
func (s *Store) byRepositoryDigestLocked(canonical string) (string, error) {
	repo, digest, ok := strings.Cut(canonical, "@")
	if !ok {
		return "", nil
	}
	names, err := s.records.names(digest)
	if err != nil {
		return "", err
	}
	for _, n := range names {
		if r, err := name.ParseReference(n); err == nil && strings.HasPrefix(n, repo) && dockerName(r.Context().Digest(digest)) == canonical {
			return digest, nil
		}
	}
	return "", nil
}

func (s *Store) imageLocked(digest string) (Image, error) {
	r, err := s.records.get(digest)
	if err != nil {
		return Image{}, err
	}
	names, err := s.records.names(digest)
	if err != nil {
		return Image{}, err
	}
	return Image{
		Digest:    digest,
		Names:     names,
		SizeBytes: r.SizeBytes,
		CreatedAt: r.CreatedAt,
		Platform:  r.Platform,
		Config:    r.Config,
		Path:      s.path(digest),
	}, nil
}

func (s *Store) path(digest string) string {
	return filepath.Join(s.dir, erofsDir, fileName(digest))
}

// List gives all images, by name, those without one last.
func (s *Store) List() ([]Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	all, err := s.records.all()
	if err != nil {
		return nil, err
	}
	images := make([]Image, 0, len(all))
	for digest := range all {
		image, err := s.imageLocked(digest)
		if err != nil {
			return nil, err
		}
		images = append(images, image)
	}
	key := func(i Image) string {
		if len(i.Names) == 0 {
			return "\xff" + i.Digest
		}
		return i.Names[0]
	}
	slices.SortFunc(images, func(a, b Image) int { return strings.Compare(key(a), key(b)) })
	return images, nil
}

// Remove forgets a name. With the last name, or when ref is a digest, the image itself goes, unless inUse says that a
// workload needs it. inUse is called with the store locked and must not call the store. What is mounted or open already
// stays readable to who has it.
func (s *Store) Remove(ref string, inUse func(digest string) bool) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	digest, canonical, err := s.findLocked(ref)
	if err != nil {
		return err
	}
	names, err := s.records.names(digest)
	if err != nil {
		return err
	}
	if slices.Contains(names, canonical) && len(names) > 1 {
		return s.records.untag(canonical)
	}
	if inUse != nil && inUse(digest) {
		return spec.Errorf(spec.KindWrongState, "cannot remove the image %s: a workload or a snapshot uses it; delete that first", quote(ref))
	}
	if err := s.records.remove(digest); err != nil {
		return fmt.Errorf("cannot remove the image %s: %w", quote(ref), err)
	}
	fault.At("image", "removed from the records")
	// The record is gone, so the image is: if this fails, the next Open removes the file.
	if err := os.Remove(s.path(digest)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("cannot remove the file of the image %s: %w", quote(ref), err)
	}
	fault.At("image", "file removed")
	return nil
}

// keyedLocks are mutexes by name that waiting for can be given up.
type keyedLocks struct {
	mu   sync.Mutex
	held map[string]chan struct{}
}

// lock waits until nobody holds key. The caller calls unlock.
func (k *keyedLocks) lock(ctx context.Context, key string) (unlock func(), err error) {
	for {
		k.mu.Lock()
		free, held := k.held[key]
		if !held {
			if k.held == nil {
				k.held = map[string]chan struct{}{}
			}
			mine := make(chan struct{})
			k.held[key] = mine
			k.mu.Unlock()
			return func() {
				k.mu.Lock()
				delete(k.held, key)
				k.mu.Unlock()
				close(mine)
			}, nil
		}
		k.mu.Unlock()
		select {
		case <-free:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}
