package image

import (
	"context"
	"crypto/sha256"
	"fmt"
	"hash"
	"io"
	"os"
	"time"
)

// fetchAttempts is how often a layer is asked for before a failing network fails the pull, and fetchPause how long to wait
// before asking again.
const (
	fetchAttempts = 3
	fetchPause    = time.Second
)

// unpack gives the tar of a layer, after its blob's digest and its content's were seen to be right.
func (im *importer) unpack(ctx context.Context, l *layerSource) (section, error) {
	if l.raw.file != nil {
		return im.unpackFile(ctx, l)
	}
	f, err := im.spool()
	if err != nil {
		return section{}, err
	}
	for attempt := 1; ; attempt++ {
		size, err := im.fetch(ctx, l, f)
		if err == nil {
			return section{f, 0, size}, nil
		}
		if ctx.Err() != nil || isTyped(classify(err)) || attempt == fetchAttempts {
			return section{}, fmt.Errorf("layer %s: %w", l.digest, err)
		}
		select {
		case <-time.After(fetchPause):
		case <-ctx.Done():
			return section{}, context.Cause(ctx)
		}
		if err := f.Truncate(0); err != nil {
			return section{}, err
		}
		if _, err := f.Seek(0, io.SeekStart); err != nil {
			return section{}, err
		}
	}
}

// fetch spools a layer from its source.
func (im *importer) fetch(ctx context.Context, l *layerSource, f *os.File) (int64, error) {
	r, err := l.open(ctx)
	if err != nil {
		return 0, err
	}
	defer r.Close()
	done := int64(0)
	counted := &meteredReader{r: r, meter: func(n int) error {
		done += int64(n)
		im.progress.report(Progress{Phase: PhaseFetch, Layer: l.digest, Done: done, Total: l.size})
		if done > l.size {
			return invalidf("layer %s is longer than the %d bytes its manifest says", l.digest, l.size)
		}
		return im.budget.receive(n)
	}}
	return im.unpackTo(ctx, l, counted, f)
}

// unpackFile reads a layer that lies in an archive. If it isn't compressed it need not be copied.
func (im *importer) unpackFile(ctx context.Context, l *layerSource) (section, error) {
	head, err := decompress(l.raw.reader(), im.budget)
	if err != nil {
		return section{}, err
	}
	if err := head.Close(); err != nil {
		return section{}, err
	}
	if head.name == "" {
		if _, err := im.unpackTo(ctx, l, l.raw.reader(), io.Discard); err != nil {
			return section{}, err
		}
		return l.raw, nil
	}
	f, err := im.spool()
	if err != nil {
		return section{}, err
	}
	size, err := im.unpackTo(ctx, l, l.raw.reader(), f)
	return section{f, 0, size}, err
}

// unpackTo decompresses a layer's blob and checks both its digests.
func (im *importer) unpackTo(ctx context.Context, l *layerSource, blob io.Reader, to io.Writer) (int64, error) {
	blobHash, tarHash := sha256.New(), sha256.New()
	raw := io.TeeReader(blob, blobHash)
	d, err := decompress(raw, im.budget)
	if err != nil {
		return 0, err
	}
	defer d.Close()
	size, err := copyAll(ctx, io.MultiWriter(to, tarHash), d)
	if err != nil {
		return 0, err
	}
	if _, err := copyAll(ctx, io.Discard, raw); err != nil {
		return 0, err
	}
	if l.digest != "" {
		if err := sameDigest("layer", l.digest, blobHash); err != nil {
			return 0, err
		}
	}
	return size, sameDigest("content of layer", l.diffID, tarHash)
}

func sameDigest(what, want string, h hash.Hash) error {
	if got := digestOf(h.Sum(nil)); got != want {
		return invalidf("its %s %s has the digest %s: it was damaged or tampered with", what, want, got)
	}
	return nil
}
