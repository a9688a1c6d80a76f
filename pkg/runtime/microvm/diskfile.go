package microvm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// diskFile is the node of QEMU's that is a guest's disk: the same for its command line and for its monitor, since a node is
// opened anew with all of its options. Its keys are those of BlockdevOptionsFile in QEMU's QAPI schema.
var diskFile = []struct{ key, value string }{
	{"driver", "file"}, {"node-name", "disk-file"}, {"filename", "/dev/fdset/2"}, {"locking", "on"}, {"discard", "unmap"},
}

// diskFileArg is the node for -blockdev. direct: see disk.SetLoopDirect.
func diskFileArg(direct bool) string {
	var words []string
	for _, o := range diskFile {
		words = append(words, o.key+"="+o.value)
	}
	if direct {
		words = append(words, "cache.direct=on")
	}
	return strings.Join(words, ",")
}

// diskFileOptions is the node for blockdev-reopen.
func diskFileOptions(direct bool) map[string]any {
	options := map[string]any{"cache": map[string]any{"direct": direct}}
	for _, o := range diskFile {
		options[o.key] = o.value
	}
	return options
}

// setDirectDisk has QEMU write past the host's page cache, or again through it.
func (i *instance) setDirectDisk(ctx context.Context, direct bool) error {
	i.mu.Lock()
	same := i.directDisk == direct
	i.mu.Unlock()
	if same || i.layer == "" {
		return nil
	}
	// QEMU waits until nothing is put off any more, and nobody waits long for QEMU.
	if err := syncLayer(i.layer); err != nil {
		return err
	}
	q, err := i.monitor(ctx)
	if err != nil {
		return err
	}
	defer q.Close() //nolint:errcheck // only asked
	err = q.executeWith(ctx, "blockdev-reopen", map[string]any{"options": []any{diskFileOptions(direct)}}, nil, nil)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return spec.Errorf(spec.KindWrongState, "cannot change how microVM %s writes to its disk: QEMU does not answer; resume it, if it is paused, and try again: %w", i.rec.ID, err)
	}
	if err != nil {
		return spec.Errorf(spec.KindWrongState, "cannot change how microVM %s writes to its disk: %w; stop it, update it and start it again", i.rec.ID, err)
	}
	i.mu.Lock()
	i.directDisk = direct
	i.mu.Unlock()
	rec := i.rec
	rec.DirectDisk = direct
	return rec.save(i.dir)
}

func syncLayer(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("cannot open the writable layer: %w", err)
	}
	return errors.Join(f.Sync(), f.Close())
}
