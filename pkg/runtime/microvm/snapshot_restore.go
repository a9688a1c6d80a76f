package microvm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"github.com/sandboxd/sandboxd/pkg/runtime"
	"github.com/sandboxd/sandboxd/pkg/spec"
)

// restoreTimeout bounds a start from a snapshot, and each of QEMU's answers meanwhile: it reads a guest's whole memory before it
// answers again.
const restoreTimeout = 2 * time.Minute

// restoring is a snapshot that a VM goes on from.
type restoring struct {
	meta snapshotMeta
	// The token of the guest that it was taken of.
	token bootToken
	// Compared with their sums. The disk is compared while it is copied.
	state, disk *os.File
}

func (r *restoring) close() { _ = errors.Join(r.state.Close(), r.disk.Close()) } // only read

// Restore implements runtime.Restorer.
func (r *Runtime) Restore(ctx context.Context, s spec.Sandbox, dir string) (runtime.Instance, error) {
	i, err := r.restore(ctx, s, dir)
	if err != nil {
		return nil, fmt.Errorf("cannot go on from the snapshot: %w", err)
	}
	return i, nil
}

func (r *Runtime) restore(ctx context.Context, s spec.Sandbox, dir string) (*instance, error) {
	if err := checkID(s.ID); err != nil {
		return nil, err
	}
	if spec.Joins(s.Network) {
		return nil, spec.Errorf(spec.KindUnsupported, "its guest would have the address of another one")
	}
	accel, err := r.accelerator(ctx)
	if err != nil {
		return nil, err
	}
	from, err := r.openSnapshot(dir, accel)
	if err != nil {
		return nil, err
	}
	defer from.close()
	if s.Resources.MemoryBytes != from.meta.MemoryBytes && guestBytes(s.Resources) != from.meta.MemoryBytes {
		return nil, spec.Errorf(spec.KindWrongState, "it has %d bytes of memory, and what goes on from it %d", from.meta.MemoryBytes, guestBytes(s.Resources))
	}
	s.Snapshots = true
	b := &boot{r: r, sandbox: s, accel: accel, timeout: restoreTimeout, restore: from}
	return b.run(ctx)
}

func (r *Runtime) openSnapshot(dir, accel string) (*restoring, error) {
	meta, err := readSnapshotMeta(dir)
	if err != nil {
		return nil, err
	}
	qemu, err := r.qemuIdentity()
	if err == nil {
		err = meta.fits(accel, qemu)
	}
	if err != nil {
		return nil, err
	}
	from := &restoring{meta: meta}
	if from.token, err = (record{Token: meta.Token}).token(); err != nil {
		return nil, err
	}
	if from.state, err = openSnapshotFile(dir, stateFile, meta.MemoryBytes+maxTemplateState, meta.StateSum); err != nil {
		return nil, err
	}
	if from.disk, err = openSnapshotFile(dir, snapshotDiskFile, meta.DiskBytes, ""); err != nil {
		return nil, errors.Join(err, from.state.Close())
	}
	return from, nil
}

// copyDisk makes the new layer what the snapshot's is.
func (r *restoring) copyDisk(path string) error {
	to, err := os.OpenFile(path, os.O_WRONLY|os.O_TRUNC, 0)
	if err != nil {
		return fmt.Errorf("cannot write its disk: %w", err)
	}
	sum, err := copySparse(to, r.disk)
	if err == nil && sum != r.meta.DiskSum {
		err = damagedSnapshot(fmt.Errorf("%s is not what was written", snapshotDiskFile))
	}
	return errors.Join(err, to.Close())
}

// readopt tells a guest that goes on from a snapshot who it is now, over a connection that proved who it was: see
// spec/channel.go.
func (i *instance) readopt(ctx context.Context, conn net.Conn) (_ net.Conn, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("cannot tell the guest who it is: %w", err), ignoreClosed(conn.Close()))
		}
	}()
	if err := conn.SetWriteDeadline(time.Now().Add(prefaceTimeout)); err != nil {
		return nil, err
	}
	if _, err := conn.Write([]byte{spec.ReadoptionMark}); err != nil {
		return nil, err
	}
	return i.tell(ctx, conn)
}

// tell gives a guest its token and random bytes, and hears that it has them.
func (i *instance) tell(ctx context.Context, conn net.Conn) (net.Conn, error) {
	token, err := i.rec.token()
	if err != nil {
		return nil, err
	}
	told := make([]byte, spec.AdoptionLen)
	copy(told, token[:])
	if _, err := rand.Read(told[spec.TokenLen:]); err != nil {
		return nil, err
	}
	adopting, ok := i.transport.(adopter)
	if !ok {
		return nil, fmt.Errorf("its transport %s has no clones", i.rec.Transport.Name)
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	if err := conn.SetWriteDeadline(time.Now().Add(prefaceTimeout)); err != nil {
		return nil, err
	}
	if _, err := conn.Write(told); err != nil {
		return nil, err
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return nil, err
	}
	if err := readPrefaceContext(ctx, conn, token); err != nil {
		return nil, err
	}
	adopting.adopted(token)
	return conn, nil
}

// hexToken is a token as records keep it.
func hexToken(t bootToken) string { return hex.EncodeToString(t[:]) }
