package microvm

import (
	"context"
	"crypto/subtle"
	"errors"
	"io"
	"net"
	"time"

	"github.com/sandboxd/sandboxd/pkg/spec"
)

// prefaceTimeout bounds how long a guest may take from a connection's first byte to the end of its preface: an agent
// sends it in one write.
const prefaceTimeout = 5 * time.Second

// errPreface: the guest's end is not the agent of this boot.
var errPreface = errors.New("the guest's preface is not that of this boot")

// readPreface reads the preface and compares it, in constant time. The deadline for its first byte is the caller's; it
// leaves conn without one.
func readPreface(conn net.Conn, token bootToken) error {
	var got [spec.PrefaceLen]byte
	if _, err := io.ReadFull(conn, got[:1]); err != nil {
		return err
	}
	if err := conn.SetReadDeadline(time.Now().Add(prefaceTimeout)); err != nil {
		return err
	}
	if _, err := io.ReadFull(conn, got[1:]); err != nil {
		return err
	}
	if subtle.ConstantTimeCompare(got[:], spec.Preface(token)) != 1 {
		return errPreface
	}
	return conn.SetReadDeadline(time.Time{})
}

// readPrefaceContext is readPreface that ends with ctx.
func readPrefaceContext(ctx context.Context, conn net.Conn, token bootToken) error {
	// A deadline in the past ends a read that is under way, but readPreface may just be setting its own. Closing ends both.
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	err := readPreface(conn, token)
	if !stop() && err == nil {
		err = ctx.Err() // closed under our hands
	}
	return err
}
