package workload

import (
	"context"
	"io"

	"github.com/sandboxd/sandboxd/pkg/fault"
)

// CopyIn unpacks a tar stream below a directory of a running workload.
func (m *Manager) CopyIn(ctx context.Context, ref, path string, r io.Reader) error {
	e, err := m.find(ref)
	if err != nil {
		return err
	}
	live, err := e.running()
	if err != nil {
		return err
	}
	err = e.sessionError(live.client.CopyIn(ctx, containerID, path, r))
	fault.At("copy", "into")
	return err
}

// CopyOut writes a tar stream of a file or directory of a running workload.
func (m *Manager) CopyOut(ctx context.Context, ref, path string, w io.Writer) error {
	e, err := m.find(ref)
	if err != nil {
		return err
	}
	live, err := e.running()
	if err != nil {
		return err
	}
	err = e.sessionError(live.client.CopyOut(ctx, containerID, path, w))
	fault.At("copy", "out of")
	return err
}
