package image

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sync/errgroup"

	"github.com/sandboxd/sandboxd/pkg/fault"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// Import reads an archive from r: what docker save writes, an OCI layout, or the files of a root file system, as a tar,
// compressed or not. name is required unless the archive names itself; if given it is the image's only new name, and
// chooses among the images of an archive that holds several.
//
// ctx ends it between reads of r: r must not block for longer than its caller is willing to wait.
func (s *Store) Import(ctx context.Context, r io.Reader, name string) (Image, error) {
	want := ""
	if name != "" {
		var err error
		if want, err = canonicalName(name); err != nil {
			return Image{}, err
		}
	}
	ctx, done, err := s.use(ctx)
	if err != nil {
		return Image{}, err
	}
	defer done()
	im := s.newImporter(ctx, nil)
	defer im.release()
	image, err := im.importArchive(r, want)
	if err != nil {
		what := "the image"
		if name != "" {
			what = "the image " + quote(name)
		}
		return Image{}, subject("import", what, err)
	}
	return image, nil
}

// importer is one import or pull under way. Its spools vanish when it is released.
type importer struct {
	*Store
	ctx      context.Context
	budget   *budget
	progress *reporter

	// Whether this import has the right that enter gives.
	merging bool

	mu     sync.Mutex // guards spools: layers are unpacked concurrently
	spools []*os.File
}

func (s *Store) newImporter(ctx context.Context, progress func(Progress)) *importer {
	return &importer{Store: s, ctx: ctx, budget: &budget{limits: s.limits}, progress: newReporter(progress)}
}

func (im *importer) release() {
	im.leave()
	for _, f := range im.spools {
		f.Close()
	}
}

func (im *importer) spool() (*os.File, error) {
	f, err := newSpool(filepath.Join(im.dir, tmpDir))
	if err != nil {
		return nil, err
	}
	im.mu.Lock()
	defer im.mu.Unlock()
	im.spools = append(im.spools, f)
	return f, nil
}

// enter waits for the right to hold a tree in memory, which one import at a time has. It may be called again; leave or
// release gives the right back. Locks of digests are taken before it, never after.
func (im *importer) enter() error {
	if im.merging {
		return nil
	}
	select {
	case im.building <- struct{}{}:
		im.merging = true
		return nil
	case <-im.ctx.Done():
		return context.Cause(im.ctx)
	}
}

func (im *importer) leave() {
	if im.merging {
		<-im.building
		im.merging = false
	}
}

func (im *importer) importArchive(r io.Reader, want string) (Image, error) {
	tar, digest, err := im.receive(r)
	if err != nil {
		return Image{}, err
	}
	fault.At("image", "received")
	// A root file system's digest is its archive's. For an image in an archive this lock is needless and harms nobody.
	unlock, err := im.digests.lock(im.ctx, digest)
	if err != nil {
		return Image{}, err
	}
	defer unlock()
	if err := im.enter(); err != nil {
		return Image{}, err
	}
	entries, err := readLayer(im.ctx, tar, im.budget, im.spool)
	if err != nil {
		return Image{}, err
	}
	if len(entries) == 0 {
		return Image{}, invalidf("its archive is empty")
	}
	a, err := newArchive(entries, im.limits)
	if err != nil {
		return Image{}, err
	}
	if a == nil {
		return im.importRoot(tar, digest, entries, want)
	}
	src, names, err := a.find(im.ctx, want)
	if err != nil {
		return Image{}, err
	}
	if want != "" {
		names = []string{want}
	}
	switch {
	case len(names) == 0:
		return Image{}, errNoName
	case len(names) > maxNames:
		return Image{}, invalidf("it has %d names, more than %d", len(names), maxNames)
	}
	im.leave()
	return im.installSource(src, names)
}

// maxNames is how many names an archive may give an image.
const maxNames = 128

// importRoot makes an image of the files of a root file system. The caller holds the lock of its digest.
func (im *importer) importRoot(tar section, digest string, entries []entry, name string) (Image, error) {
	if name == "" {
		return Image{}, errNoName
	}
	if err := checkEnd(tar); err != nil {
		return Image{}, err
	}
	config := configFile{platform: platformOS + "/" + platformArch}
	return im.installLocked(digest, config, []string{name}, func() (*tree, error) {
		t := newTree(im.budget)
		return t, t.apply(im.ctx, entries)
	})
}

// checkEnd refuses a tar without the zeros that mark its end. Readers of tars take it, and nobody would notice that half a
// root file system is missing: unlike a layer it has no digest to answer to.
func checkEnd(s section) error {
	const block = 512
	end := make([]byte, block)
	if _, err := s.reader().ReadAt(end, max(s.size-block, 0)); err != nil {
		return err
	}
	if !isZero(end) {
		return invalidf("its tar was cut short: the end is missing")
	}
	return nil
}

var errNoName = spec.Invalidf("name", "the archive does not name the image: give it a name")

// receive spools what r gives, decompressed, and hashes it as it came.
func (im *importer) receive(r io.Reader) (section, string, error) {
	f, err := im.spool()
	if err != nil {
		return section{}, "", err
	}
	hash := sha256.New()
	raw := &meteredReader{r: io.TeeReader(r, hash), meter: im.budget.receive}
	d, err := decompress(raw, im.budget)
	if err != nil {
		return section{}, "", err
	}
	defer d.Close()
	size, err := copyAll(im.ctx, f, d)
	if err != nil {
		return section{}, "", err
	}
	// What follows the end of the compression is part of the archive's digest.
	if _, err := copyAll(im.ctx, io.Discard, raw); err != nil {
		return section{}, "", err
	}
	return section{f, 0, size}, digestOf(hash.Sum(nil)), nil
}

// meteredReader tells meter the length of each read, before its data goes on.
type meteredReader struct {
	r     io.Reader
	meter func(n int) error
}

func (m *meteredReader) Read(p []byte) (int, error) {
	n, err := m.r.Read(p)
	if n > 0 {
		if err := m.meter(n); err != nil {
			return 0, err
		}
	}
	return n, err
}

// layersAtOnce is how many layers are fetched and unpacked at a time: enough to hide a registry's latency.
const layersAtOnce = 3

// installSource unpacks an image's layers, merges them and installs the result.
func (im *importer) installSource(src *source, names []string) (Image, error) {
	return im.install(src.digest, src.config, names, func() (*tree, error) {
		tars := make([]section, len(src.layers))
		group, ctx := errgroup.WithContext(im.ctx)
		group.SetLimit(layersAtOnce)
		for i := range src.layers {
			group.Go(func() (err error) {
				tars[i], err = im.unpack(ctx, &src.layers[i])
				fault.At("image", "layer unpacked")
				return err
			})
		}
		if err := group.Wait(); err != nil {
			return nil, err
		}
		if err := im.enter(); err != nil {
			return nil, err
		}
		t := newTree(im.budget)
		for i, tar := range tars {
			entries, err := readLayer(im.ctx, tar, im.budget, im.spool)
			if err != nil {
				return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(tars), err)
			}
			if err := t.apply(im.ctx, entries); err != nil {
				return nil, fmt.Errorf("layer %d of %d: %w", i+1, len(tars), err)
			}
		}
		return t, nil
	})
}

// install is installLocked for who does not hold the digest's lock.
func (im *importer) install(digest string, config configFile, names []string, make func() (*tree, error)) (Image, error) {
	unlock, err := im.digests.lock(im.ctx, digest)
	if err != nil {
		return Image{}, err
	}
	defer unlock()
	return im.installLocked(digest, config, names, make)
}

// installLocked makes digest an image of the store under names. If it is one already, it only gets the names; make is
// called, and must enter, if it is not.
func (im *importer) installLocked(digest string, config configFile, names []string, make func() (*tree, error)) (Image, error) {
	if image, ok, err := im.tag(digest, names); err != nil || ok {
		return image, err
	}
	t, err := make()
	if err != nil {
		return Image{}, err
	}
	tmp, err := im.build(t, digest)
	if err != nil {
		return Image{}, err
	}
	image, err := im.commit(tmp, digest, config, names)
	if err != nil {
		os.Remove(tmp)
	}
	return image, err
}

// tag gives names to an image that is in the store; it reports false if it is not.
func (s *Store) tag(digest string, names []string) (Image, bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ok, err := s.records.tag(digest, names)
	if err != nil || !ok {
		return Image{}, false, err
	}
	image, err := s.imageLocked(digest)
	return image, err == nil, err
}

// build writes the EROFS file under a temporary name, durable and read-only.
func (im *importer) build(t *tree, digest string) (path string, err error) {
	start := time.Now()
	f, err := os.CreateTemp(filepath.Join(im.dir, tmpDir), "erofs-")
	if err != nil {
		return "", err
	}
	defer func() {
		f.Close()
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	err = writeErofs(im.ctx, f, t, digest, func(done, total int64) {
		im.progress.report(Progress{Phase: PhaseBuild, Done: done, Total: total})
	})
	if err != nil {
		return "", err
	}
	if err := f.Chmod(0o444); err != nil {
		return "", err
	}
	if err := f.Sync(); err != nil {
		return "", err
	}
	fault.At("image", "file written")
	im.log.Debug("wrote an image file", zap.String("digest", digest), zap.Duration("took", time.Since(start)))
	return f.Name(), nil
}

// commit puts a finished file in its place and records it: file, directory, record, in that order on disk.
func (s *Store) commit(tmp, digest string, config configFile, names []string) (Image, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil {
		return Image{}, errClosed
	}
	info, err := os.Stat(tmp)
	if err != nil {
		return Image{}, err
	}
	if err := os.Rename(tmp, s.path(digest)); err != nil {
		return Image{}, err
	}
	if err := syncDir(filepath.Join(s.dir, erofsDir)); err != nil {
		return Image{}, err
	}
	fault.At("image", "file named")
	one := record{SizeBytes: info.Size(), CreatedAt: config.created.UTC(), Platform: config.platform, Config: config.image}
	if config.created.IsZero() {
		one.CreatedAt = time.Now().UTC()
	}
	if err := s.records.put(digest, one, names); err != nil {
		os.Remove(s.path(digest))
		return Image{}, err
	}
	fault.At("image", "recorded")
	return s.imageLocked(digest)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
