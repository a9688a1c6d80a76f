package guest

import (
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/sandboxd/sandboxd/pkg/spec"
	"github.com/sandboxd/sandboxd/pkg/weaken"
)

// adopt waits until a daemon says who this guest is: see spec/channel.go. A guest that becomes a template stands here
// when its memory is taken, and each of its clones goes on from here. Until the daemon's random bytes have been taken over
// the agent draws none: what it drew would be every clone's.
func adopt(dial func(context.Context) (net.Conn, error), random *os.File) (net.Conn, [spec.TokenLen]byte) {
	for {
		conn, token, err := tryAdopt(dial, random)
		if err == nil {
			return conn, token
		}
		// A clone's connections are those of its template, which end at once.
		time.Sleep(adoptPause)
	}
}

// adoptPause keeps an agent whose connections fail at once from spinning.
const adoptPause = time.Millisecond

func tryAdopt(dial func(context.Context) (net.Conn, error), random *os.File) (_ net.Conn, token [spec.TokenLen]byte, err error) {
	conn, err := dial(context.Background())
	if err != nil {
		return nil, token, err
	}
	defer func() {
		if err != nil {
			conn.Close()
		}
	}()
	if _, err := conn.Write(spec.Preface(token)); err != nil {
		return nil, token, err
	}
	if token, err = takeAdoption(conn, random); err != nil {
		return nil, token, err
	}
	if _, err := conn.Write(spec.Preface(token)); err != nil {
		return nil, token, fmt.Errorf("cannot answer an adoption: %w", err)
	}
	return conn, token, nil
}

// takeAdoption reads who this guest is, and gives its kernel the random bytes that come with it.
func takeAdoption(conn net.Conn, random *os.File) (token [spec.TokenLen]byte, err error) {
	var told [spec.AdoptionLen]byte
	if _, err := io.ReadFull(conn, told[:]); err != nil {
		return token, err
	}
	if err := addEntropy(random, told[spec.TokenLen:]); err != nil {
		return token, err
	}
	copy(token[:], told[:spec.TokenLen])
	clear(told[:])
	return token, nil
}

// readopt makes this guest, whose memory was taken in the middle of its life, somebody else: see spec/channel.go. adopted is
// told the token before the daemon is.
func (w *vmWall) readopt(conn net.Conn, adopted func([spec.TokenLen]byte)) ([]byte, error) {
	if err := conn.SetReadDeadline(time.Now().Add(readoptionWait)); err != nil {
		return nil, err
	}
	token, err := takeAdoption(conn, w.random)
	if err != nil {
		return nil, err
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return nil, err
	}
	adopted(token)
	preface := spec.Preface(token)
	if _, err := conn.Write(preface); err != nil {
		// The daemon gives up a guest from which it hears nothing.
		return nil, fmt.Errorf("cannot answer an adoption: %w", err)
	}
	return preface, nil
}

// readoptionWait bounds the wait for the rest of an adoption, which comes in one piece.
const readoptionWait = 10 * time.Second

// age is for a test build. A kernel's generator reseeds itself every second at first, ever more seldom later, so the clones of
// a guest that has been up for a second come to differ by themselves; of one that is older, and has just drawn, they don't.
func age() {
	if weaken.Without("youth") {
		time.Sleep(templateAge)
		_, _ = unix.Getrandom(make([]byte, 64), 0)
	}
}

const templateAge = 12 * time.Second

// dropCaches gives back what the guest's kernel read and will not read again (the initramfs's modules, the agent's own
// file twice): a template's memory is copied and kept.
func dropCaches() error {
	unix.Sync()
	return os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0)
}
