package microvm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

const (
	vsockSocket = "vsock.sock"

	// A guest's CID and port over vhost-user are nobody else's business: each guest has a helper of its own.
	vhostUserCID  = 3
	vhostUserPort = 1023

	// How often in one Dial the helper may join us with a connection that is not the agent's. Anything in the guest may
	// dial; an agent's turn comes sooner unless the guest keeps it from us.
	maxBadPrefaces = 64
	// Between two tries, so that a guest that hangs up at once can't make us spin.
	badPrefacePause = 10 * time.Millisecond
)

// vhostUser is the transport over a sandbox-vsock process. It holds nothing in the daemon but its name.
type vhostUser struct {
	dir    string
	record transportRecord
	token  bootToken

	// Done when the transport is closed.
	life  context.Context
	close context.CancelFunc
}

func newVhostUser(dir string, token bootToken) (transport, transportFiles, error) {
	listener, err := listenUnix(dir, vsockSocket)
	if err != nil {
		return nil, transportFiles{}, err
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, transportFiles{}, errors.Join(fmt.Errorf("cannot make a vhost-user socket: %w", err),
			listener.Close())
	}
	files := transportFiles{
		QEMU:   os.NewFile(uintptr(pair[0]), "vhost-user of QEMU"),
		Helper: []*os.File{os.NewFile(uintptr(pair[1]), "vhost-user of the helper"), listener},
	}
	record := transportRecord{Name: transportVhostUser, CID: vhostUserCID, Port: vhostUserPort}
	return makeVhostUser(dir, record, token), files, nil
}

func attachVhostUser(dir string, rec transportRecord, token bootToken) (transport, error) {
	return makeVhostUser(dir, rec, token), nil
}

func makeVhostUser(dir string, rec transportRecord, token bootToken) *vhostUser {
	life, cancel := context.WithCancel(context.Background())
	return &vhostUser{dir: dir, record: rec, token: token, life: life, close: cancel}
}

func (v *vhostUser) Record() transportRecord { return v.record }

func (v *vhostUser) Close() error {
	v.close()
	return nil
}

// Dial connects to the helper, which joins us with the oldest of the guest's connections or keeps us until there is one.
func (v *vhostUser) Dial(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(v.life, cancel)()

	var err error
	for range maxBadPrefaces {
		var conn net.Conn
		if conn, err = dialUnix(ctx, v.dir, vsockSocket); err != nil {
			break // no helper
		}
		if err = readPrefaceContext(ctx, conn, v.token); err == nil {
			return conn, nil
		}
		_ = conn.Close() // nothing was said on it
		select {
		case <-ctx.Done():
		case <-time.After(badPrefacePause):
		}
		if ctx.Err() != nil {
			break
		}
	}
	switch {
	case v.life.Err() != nil:
		return nil, net.ErrClosed
	case ctx.Err() != nil:
		return nil, ctx.Err()
	}
	return nil, err
}
